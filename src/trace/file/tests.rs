use super::*;

fn span(rank: u32, track: &str) -> Span {
    Span { name: "forward".into(), track: track.into(), rank, ranks: 2, step: 7, start_us: 1.5, duration_us: 2.25 }
}

fn held(ranks: &[u32], all: u32) -> Held {
    let mut held = Held::default();
    ranks.iter().for_each(|&rank| held.add(rank, all));
    held
}

#[test]
fn a_process_with_some_of_the_ranks_has_a_file_of_its_own() {
    let file = Path::new("out/trace.json");
    assert_eq!(held(&[0, 1], 2).path(file), file);
    assert_eq!(held(&[3], 4).path(file), Path::new("out/trace.rank3.json"));
    assert_eq!(held(&[1], 2).path(Path::new("trace")), Path::new("trace.rank1"));
    assert_eq!(held(&[], 0).path(file), file);
}

#[test]
fn the_file_is_chrome_s_after_each_time() {
    let folder = std::env::temp_dir().join(format!("pfc-events-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("trace.json");
    std::fs::write(&path, "what was there before, and longer than what comes first").unwrap();
    let mut file = EventFile::create(path.clone());
    file.check().unwrap();
    let read = || std::fs::read_to_string(&path).unwrap();
    assert_eq!(read(), "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n]}\n");
    file.add(&[]).unwrap();
    file.add(&[span(1, "main")]).unwrap();
    let first = concat!(
        "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n",
        "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"rank 1\"}},\n",
        "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":0,\"args\":{\"name\":\"main\"}},\n",
        "{\"name\":\"forward\",\"ph\":\"X\",\"pid\":1,\"tid\":0,\"ts\":1.500,\"dur\":2.250,\"args\":{\"step\":7}}",
    );
    assert_eq!(read(), format!("{first}\n]}}\n"));
    file.add(&[span(0, "host"), span(1, "main")]).unwrap();
    let second = concat!(
        ",\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":0,\"args\":{\"name\":\"rank 0\"}},\n",
        "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":0,\"tid\":1,\"args\":{\"name\":\"host\"}},\n",
        "{\"name\":\"forward\",\"ph\":\"X\",\"pid\":0,\"tid\":1,\"ts\":1.500,\"dur\":2.250,\"args\":{\"step\":7}},\n",
        "{\"name\":\"forward\",\"ph\":\"X\",\"pid\":1,\"tid\":0,\"ts\":1.500,\"dur\":2.250,\"args\":{\"step\":7}}",
    );
    assert_eq!(read(), format!("{first}{second}\n]}}\n"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_is_no_file_of_data_is_left_alone() {
    let folder = std::env::temp_dir().join(format!("pfc-no-events-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (target, link) = (folder.join("target"), folder.join("link.json"));
    std::fs::write(&target, "precious").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    for (path, why) in [(&link, "a link"), (&folder, "directory"), (&folder.join("no/x.json"), "No such file")] {
        let mut file = EventFile::create(path.clone());
        let text = file.check().unwrap_err();
        assert!(text.contains(why) && text.contains(&*path.to_string_lossy()), "{text}");
        file.add(&[span(0, "host")]).expect("told once");
    }
    EventFile::create("/dev/null".into()).check().unwrap_err();
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    std::fs::remove_dir_all(&folder).unwrap();
}
