use super::*;

/// Rows are read in any order, and readers dropped with a piece on its way.
#[test]
fn rows_are_read_as_they_were_written() {
    use DType::{Bf16, F32};
    // Files of several pieces, and those in which tensors share a block or a sector. An odd number of 2-byte elements is padded.
    let large = [(512, 3999, vec![F32, F32]), (1023, 3999, vec![Bf16, F32]), (511, 3999, vec![F32, Bf16, Bf16])];
    let small = [(512, 700, vec![F32, F32, F32]), (1, 5, vec![Bf16, Bf16, F32]), (8, 1024, vec![F32]), (1 << 20, 3, vec![Bf16; 3])];
    for (number, (dim, rows, dtypes)) in large.into_iter().chain(small).enumerate() {
        let names = ["weight", "momentum", "second_moment"];
        let tensors: Vec<_> = names.into_iter().zip(&dtypes).map(|(name, &dtype)| Tensor { name, dtype }).collect();
        let layout = Layout { dim, rows, tensors: &tensors };
        let path = std::env::temp_dir().join(format!("partialfc-rows-{}-{number}", std::process::id()));
        let row = |tensor: usize, row: u64| -> Vec<u8> {
            let bytes = tensors[tensor].dtype.size() as u64 * dim;
            (0..bytes).map(|byte| (tensor as u64 * 77 + row * 31 + byte * 7 + row / 256) as u8).collect()
        };
        let mut writer = RowsWriter::create(&path, layout).expect("a file");
        for number in 0..rows {
            (0..tensors.len()).for_each(|tensor| writer.write(tensor, &row(tensor, number)).expect("a write"));
        }
        let checksums_crc32 = writer.finish().expect("a file that is whole");
        let named = RowsFile { name: String::new(), first: 0, rows, checksums_crc32 };
        for (once, tensor) in [(true, 0), (false, tensors.len() - 1)] {
            let mut reader = RowsReader::open(&path, layout, &named, tensor, once).expect("the file");
            for first in [0, rows - 3, rows / 2, rows / 2 + 1, 100, 0, rows - 3, 0] {
                let first = first.min(rows - 3);
                let expected = [row(tensor, first), row(tensor, first + 1), row(tensor, first + 2)].concat();
                let mut found = vec![0; expected.len()];
                reader.read(first, &mut found).expect("rows");
                assert!(found == expected, "tensor {tensor} from row {first}, {rows} x {dim}, {dtypes:?}");
            }
            // None that has no row of the tensor.
            let (begin, length) = (DATA + layout.begin(tensor), layout.tensor_bytes(tensor));
            let next = (begin + 3 * length / rows - 1) / PIECE as u64 + 1;
            assert_eq!(reader.ahead, (next * (PIECE as u64) < begin + length).then_some(next), "{rows} x {dim}, {dtypes:?}");
        }
        std::fs::remove_file(&path).expect("the file");
    }
}

/// A file is the same in whichever order its tensors are written, wherever the first of them ends.
#[test]
fn tensors_may_be_written_in_turns() {
    let tensors = [Tensor { name: "weight", dtype: DType::F32 }, Tensor { name: "momentum", dtype: DType::F32 }];
    let (data, sector) = (DATA as usize, SECTOR);
    // In the middle of a sector, in the last one of a piece, with a piece, a block, a sector; and nothing.
    let ends = [5000, PIECE - 100, PIECE, 2 * PIECE, BLOCK, PIECE + sector, PIECE - sector + 4, data];
    for end in ends {
        let rows = (end - data) / 4;
        let layout = Layout { dim: 1, rows: rows as u64, tensors: &tensors };
        let bytes = |tensor: usize| (0..4 * rows).map(|at| (at * 7 + at / 4096 + tensor) as u8).collect::<Vec<u8>>();
        let written = |order: [usize; 2], at_once: usize| {
            let path = std::env::temp_dir().join(format!("partialfc-turns-{}", std::process::id()));
            let mut writer = RowsWriter::create(&path, layout).expect("a file");
            for tensor in order {
                bytes(tensor).chunks(at_once).for_each(|some| writer.write(tensor, some).expect("a write"));
            }
            let checksum = writer.finish().expect("a file that is whole");
            let file = std::fs::read(&path).expect("the file");
            std::fs::remove_file(&path).expect("the file");
            (checksum, file)
        };
        let (checksum, file) = written([0, 1], usize::MAX);
        assert!(written([1, 0], 1000) == (checksum, file.clone()), "{end}");
        let (checked, checksums) = file.split_at(layout.checked_bytes() as usize);
        assert!(checked == [layout.header(), bytes(0), bytes(1)].concat(), "{end}");
        let expected: Vec<u8> = checked.chunks(BLOCK).flat_map(|block| crc32fast::hash(block).to_le_bytes()).collect();
        assert_eq!(checksums, expected, "{end}");
        assert_eq!(checksum, crc32fast::hash(checksums), "{end}");
    }
}
