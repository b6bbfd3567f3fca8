use super::*;
use crate::Status;

const fn arch(ptx: bool, major: u32, minor: u32, exact: bool) -> Arch {
    Arch { ptx, major, minor, exact }
}

const ALL: [Arch; 7] = [
    arch(false, 8, 0, false),
    arch(false, 8, 6, false),
    arch(false, 8, 9, false),
    arch(false, 9, 0, true),
    arch(false, 10, 0, false),
    arch(false, 12, 0, false),
    arch(true, 8, 0, false),
];
const ROWS: Stem = Stem { name: "rows", everywhere: true };

/// `rows` for all of ALL, each image's bytes being its index there.
fn rows() -> Vec<Embedded> {
    const PLACES: [&[u8]; 7] = [&[0], &[1], &[2], &[3], &[4], &[5], &[6]];
    ALL.iter().zip(PLACES).map(|(&arch, bytes)| Embedded { stem: "rows", arch, bytes }).collect()
}

#[test]
fn a_device_gets_the_best_image_that_runs_on_it() {
    let expect = [
        ((8, 0), 0),
        ((8, 6), 1),
        ((8, 7), 1),
        ((8, 9), 2),
        ((9, 0), 3),
        ((10, 0), 4),
        ((10, 3), 4),
        ((11, 0), 6),
        ((12, 0), 5),
        ((12, 1), 5),
        ((13, 0), 6),
    ];
    for (capability, index) in expect {
        let images = Images::choose(&[ROWS], &rows(), capability).unwrap();
        assert_eq!(images.list.len(), 1);
        assert_eq!(images.list[0].stem, "rows");
        assert_eq!(*images.list[0].bytes, [index], "{capability:?}");
    }
}

#[test]
fn an_exact_image_is_for_its_own_capability() {
    let only_90a = [Embedded { stem: "rows", arch: arch(false, 9, 0, true), bytes: &[0] }];
    assert!(Images::choose(&[ROWS], &only_90a, (9, 0)).is_ok());
    for capability in [(8, 9), (9, 1), (10, 0)] {
        assert_eq!(Images::choose(&[ROWS], &only_90a, capability).unwrap_err().status, Status::Unsupported, "{capability:?}");
    }
    // Plain 9.0 serves where the exact one does not, and loses where it does.
    let both = [
        Embedded { stem: "rows", arch: arch(false, 9, 0, true), bytes: &[0] },
        Embedded { stem: "rows", arch: arch(false, 9, 0, false), bytes: &[1] },
    ];
    assert_eq!(*Images::choose(&[ROWS], &both, (9, 0)).unwrap().list[0].bytes, [0]);
    assert_eq!(*Images::choose(&[ROWS], &both, (9, 1)).unwrap().list[0].bytes, [1]);
}

#[test]
fn a_device_that_nothing_fits_is_named() {
    let error = Images::choose(&[ROWS], &rows(), (7, 5)).unwrap_err();
    assert_eq!(error.status, Status::Unsupported);
    assert!(error.message.contains("capability 7.5") && error.message.contains(ARCHITECTURES), "{error}");
}

#[test]
fn a_build_without_images_says_so() {
    let error = Images::choose(&[ROWS], &[], (9, 0)).unwrap_err();
    assert_eq!(error.status, Status::Unsupported);
    assert!(error.message.contains("contains no CUDA kernels"), "{error}");
}

#[test]
fn sources_for_some_devices_are_left_out_on_the_others() {
    let stems = [ROWS, Stem { name: "hopper", everywhere: false }];
    let mut embedded = rows();
    embedded.push(Embedded { stem: "hopper", arch: arch(false, 9, 0, true), bytes: &[9] });
    let names = |capability| -> Vec<String> {
        let images = Images::choose(&stems, &embedded, capability).unwrap();
        images.list.iter().map(|image| image.stem.to_string()).collect()
    };
    assert_eq!(names((9, 0)), ["rows", "hopper"]);
    assert_eq!(names((8, 0)), ["rows"]);
    assert_eq!(names((12, 0)), ["rows"]);
}

#[test]
fn images_are_read_from_a_folder() {
    let folder = std::env::temp_dir().join(format!("partialfc-images-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let stems = [ROWS, Stem { name: "hopper", everywhere: false }];
    let missing = Images::read(&stems, &folder).unwrap_err();
    std::fs::write(folder.join("rows.cubin"), b"image").unwrap();
    let images = Images::read(&stems, &folder);
    std::fs::write(folder.join("launches.txt"), "gemm_a 65536 2\ngemm_b 74496 2 148224 4\n").unwrap();
    let told = Images::read(&stems, &folder);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(missing.status, Status::Io);
    assert!(missing.message.contains("rows.cubin"), "{missing}");
    let images = images.unwrap();
    assert_eq!(images.list.len(), 1);
    assert_eq!(*images.list[0].bytes, *b"image");
    assert_eq!(images.launches, []);
    let pipeline = |shared, stages| Pipeline { shared, stages };
    let expected = [("gemm_a", vec![pipeline(65536, 2)]), ("gemm_b", vec![pipeline(74496, 2), pipeline(148_224, 4)])];
    assert_eq!(told.unwrap().launches, expected.map(|(entry, pipelines)| Launch { entry: entry.to_owned(), pipelines }));
}

#[test]
fn a_line_that_is_no_launch_is_shown() {
    for line in
        ["", "gemm_a", "gemm_a 65536", "gemm_a 65536 2 7", "gemm_a 65536 two", "gemm_a 65536 1", "gemm_a 65536 5", "gemm_a -1 2"]
    {
        let refused = Launch::parse(line, Path::new("variant/launches.txt")).unwrap_err();
        assert_eq!(refused.status, Status::InvalidArgument, "{line}");
        assert!(
            refused.message.contains("variant/launches.txt") && refused.message.ends_with(&format!("got {line:?}")),
            "{refused}"
        );
    }
}

#[test]
fn an_older_driver_is_refused_with_both_versions() {
    assert!(check_release(Some((13, 0)), 13000).is_ok());
    assert!(check_release(Some((13, 0)), 13020).is_ok());
    assert!(check_release(Some((13, 2)), 13000).is_ok());
    assert!(check_release(None, 11040).is_ok());
    let error = check_release(Some((13, 0)), 12080).unwrap_err();
    assert_eq!(error.status, Status::Unsupported);
    for part in ["CUDA 12.8", "nvcc 13.0", "driver 580"] {
        assert!(error.message.contains(part), "{error}");
    }
}

#[test]
fn embedded_images_are_whole() {
    for image in EMBEDDED {
        assert!(STEMS.iter().any(|stem| stem.name == image.stem));
        assert!(image.bytes.starts_with(&[0x50, 0xed, 0x55, 0xba]), "{}", image.stem);
    }
    assert_eq!(EMBEDDED.is_empty(), ARCHITECTURES == "none");
}
