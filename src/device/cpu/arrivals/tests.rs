use super::*;

#[test]
fn who_waits_is_told_of_the_chunk_or_of_the_end() {
    let mut arrivals = Arrivals::default();
    arrivals.resize(3).expect("memory");
    arrivals.restart();
    let (first, last) = (0..CHUNK, 2 * CHUNK..2 * CHUNK + 1);
    std::thread::scope(|scope| {
        let early = scope.spawn(|| arrivals.wait(&first));
        let both = scope.spawn(|| arrivals.wait(&(CHUNK - 1..CHUNK + 1)));
        let never = scope.spawn(|| arrivals.wait(&last));
        arrivals.has_come(&first);
        assert!(early.join().expect("no panic"));
        arrivals.has_come(&(CHUNK..2 * CHUNK));
        assert!(both.join().expect("no panic"));
        drop(arrivals.ending());
        assert!(!never.join().expect("no panic"));
    });
    // What has come is there after the end as well.
    assert!(arrivals.wait(&first) && arrivals.wait(&(0..0)));
    // And not in the next pass.
    arrivals.restart();
    arrivals.end();
    assert!(!arrivals.wait(&first));
}
