use super::*;
use crate::file::reserve_room;

/// Numbers that no other place of the file has.
fn byte(at: u64) -> u8 {
    (at * 31 + at / 4096 * 7 + at / PIECE as u64) as u8
}

#[test]
fn pieces_arrive_whole_and_where_they_belong() {
    let path = std::env::temp_dir().join(format!("partialfc-transfer-{}", std::process::id()));
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).expect("a file");
    // The last piece is of no whole sectors.
    let bytes = 2 * PIECE as u64 + 1234;
    reserve_room(&open(), bytes).expect("room");
    let mover = Mover::new(open(), Direction::Write);
    for at in [PIECE as u64, 0] {
        let mut piece = Piece::new().expect("memory");
        (at..).zip(piece.iter_mut()).for_each(|(at, value)| *value = byte(at));
        mover.begin(piece, at, 0..PIECE);
        assert_eq!(mover.end().1.expect("a write"), PIECE);
    }
    let last: Vec<u8> = (2 * PIECE as u64..bytes).map(byte).collect();
    mover.file().write_all_at(&last, 2 * PIECE as u64).expect("a write");
    drop(mover);
    assert!(std::fs::read(&path).expect("the file") == (0..bytes).map(byte).collect::<Vec<u8>>());

    let mover = Mover::new(open(), Direction::Read { once: true });
    for (at, wanted, there) in
        [(0, PIECE, PIECE), (2 * PIECE as u64, 1234, 1234), (2 * PIECE as u64, PIECE, 1234), (PIECE as u64, 5, 5)]
    {
        mover.begin(Piece::new().expect("memory"), at, 0..wanted);
        let (piece, moved) = mover.end();
        assert_eq!(moved.expect("a read"), there);
        assert!((at..).zip(&piece[..there]).all(|(at, &value)| value == byte(at)), "{at}");
    }
    // A piece that nobody waits for.
    mover.begin(Piece::new().expect("memory"), 0, 0..PIECE);
    drop(mover);
    std::fs::remove_file(&path).expect("the file");
}
