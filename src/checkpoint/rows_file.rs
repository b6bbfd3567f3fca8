//! The rows of one rank: a safetensors file with a checksum for each MiB of it.
//!
//! ```text
//! 8 bytes       length of the header, little-endian
//! header        JSON, padded with spaces to `DATA` bytes in all
//! weight        [rows, d] F32 or BF16, then the optimizer's tensors, alike; each at a multiple of 4 bytes, padded by a tensor of zeros
//! checksums     U32: the CRC-32 of each `BLOCK` bytes before it, from the start of the file; the last block may be shorter
//! ```

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::transfer::{Direction, Mover, Piece, PIECE};
use super::{corrupt, refused, RowsFile};
use crate::file::reserve_room;
use crate::matrix::DType;
use crate::memory::{reserve, zeros};
use crate::{Error, Result};

/// Bytes of a block with a checksum of its own. A piece has whole blocks.
const BLOCK: usize = 1 << 20;
/// Where the tensors begin.
const DATA: u64 = 4096;

/// What is in a file of rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout<'a> {
    pub dim: u64,
    pub rows: u64,
    /// In the order of the file.
    pub tensors: &'a [Tensor],
}

/// A tensor's name, and its type: f32 or bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub name: &'static str,
    pub dtype: DType,
}

impl Layout<'_> {
    fn tensor_bytes(&self, number: usize) -> u64 {
        self.tensors[number].dtype.size() as u64 * self.rows * self.dim
    }

    /// Zeros after a tensor, so that whatever comes next is aligned.
    pub fn padding(&self, number: usize) -> usize {
        (self.tensor_bytes(number).next_multiple_of(4) - self.tensor_bytes(number)) as usize
    }

    /// Where a tensor begins, counted from `DATA`; of the number after the last: where the checksums do.
    fn begin(&self, number: usize) -> u64 {
        (0..number).map(|before| self.tensor_bytes(before).next_multiple_of(4)).sum()
    }

    /// Bytes that have checksums.
    fn checked_bytes(&self) -> u64 {
        DATA + self.begin(self.tensors.len())
    }

    fn blocks(&self) -> u64 {
        self.checked_bytes().div_ceil(BLOCK as u64)
    }

    /// The length of the file.
    pub fn bytes(&self) -> u64 {
        self.checked_bytes() + 4 * self.blocks()
    }

    /// The length of the header, and the header.
    fn header(&self) -> Vec<u8> {
        let tensor = |(number, tensor): (usize, &Tensor)| {
            let (begin, end) = (self.begin(number), self.begin(number) + self.tensor_bytes(number));
            let (name, dtype) = (tensor.name, tensor.dtype.name().to_uppercase());
            let shape = format!("[{},{}]", self.rows, self.dim);
            let values = format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}},");
            match self.padding(number) as u64 {
                0 => values,
                zeros => {
                    let offsets = format!("[{end},{}]", end + zeros);
                    format!("{values}\"{name}_padding\":{{\"dtype\":\"U8\",\"shape\":[{zeros}],\"data_offsets\":{offsets}}},")
                }
            }
        };
        let tensors: String = self.tensors.iter().enumerate().map(tensor).collect();
        let (blocks, from) = (self.blocks(), self.checked_bytes() - DATA);
        let checksums =
            format!("\"checksums\":{{\"dtype\":\"U32\",\"shape\":[{blocks}],\"data_offsets\":[{from},{}]}}", from + 4 * blocks);
        let length = DATA as usize - 8;
        let mut header = (length as u64).to_le_bytes().to_vec();
        header.extend_from_slice(format!("{:length$}", format!("{{{tensors}{checksums}}}")).as_bytes());
        assert_eq!(header.len(), DATA as usize, "a header of a few names and numbers");
        header
    }
}

/// Writes a file from front to back.
pub(crate) struct RowsWriter {
    path: PathBuf,
    mover: Mover,
    /// What is written next, from byte `begun` of the file on.
    piece: Piece,
    begun: u64,
    /// Bytes of `piece` that are there.
    filled: usize,
    /// `None` while the piece before is on its way.
    spare: Option<Piece>,
    checksum: crc32fast::Hasher,
    checksums: Vec<u32>,
}

impl RowsWriter {
    pub fn create(path: &Path, layout: &Layout<'_>) -> Result<RowsWriter> {
        let mut checksums = Vec::new();
        reserve(&mut checksums, layout.blocks() as usize, "checksums")?;
        let (piece, spare) = (Piece::new()?, Some(Piece::new()?));
        let file = File::create(path).map_err(|cause| refused("create", path, &cause))?;
        reserve_room(&file, layout.bytes())
            .map_err(|cause| refused(&format!("reserve {} bytes for", layout.bytes()), path, &cause))?;
        let mover = Mover::new(file, Direction::Write);
        let checksum = crc32fast::Hasher::new();
        let mut writer = RowsWriter { path: path.to_owned(), mover, piece, begun: 0, filled: 0, spare, checksum, checksums };
        writer.write(&layout.header())?;
        Ok(writer)
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let left = BLOCK - self.filled % BLOCK;
            let (now, rest) = bytes.split_at(left.min(bytes.len()));
            self.piece[self.filled..self.filled + now.len()].copy_from_slice(now);
            self.checksum.update(now);
            self.filled += now.len();
            if now.len() == left {
                self.end_block();
            }
            if self.filled == PIECE {
                self.begin_piece()?;
            }
            bytes = rest;
        }
        Ok(())
    }

    fn end_block(&mut self) {
        self.checksums.push(std::mem::take(&mut self.checksum).finalize());
    }

    /// Sends a full piece on its way when the one before has arrived.
    fn begin_piece(&mut self) -> Result<()> {
        self.end_piece()?;
        let Some(spare) = self.spare.take() else { unreachable!("the piece before has arrived") };
        self.mover.begin(std::mem::replace(&mut self.piece, spare), self.begun, PIECE);
        (self.begun, self.filled) = (self.begun + PIECE as u64, 0);
        Ok(())
    }

    fn end_piece(&mut self) -> Result<()> {
        if self.spare.is_none() {
            let (piece, result) = self.mover.end();
            self.spare = Some(piece);
            let at = self.begun - PIECE as u64;
            result.map_err(|cause| refused(&format!("write at byte {at} of"), &self.path, &cause))?;
        }
        Ok(())
    }

    /// Writes the checksums, and waits until all is on the disk. Returns the checksum of the checksums.
    pub fn finish(mut self) -> Result<u32> {
        self.end_piece()?;
        if !self.filled.is_multiple_of(BLOCK) {
            self.end_block();
        }
        let mut bytes = Vec::new();
        reserve(&mut bytes, 4 * self.checksums.len(), "checksums")?;
        bytes.extend(self.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()));
        let (file, end) = (self.mover.file(), self.begun + self.filled as u64);
        for (at, last) in [(self.begun, &self.piece[..self.filled]), (end, &bytes)] {
            file.write_all_at(last, at).map_err(|cause| refused(&format!("write at byte {at} of"), &self.path, &cause))?;
        }
        file.sync_all().map_err(|cause| refused("flush", &self.path, &cause))?;
        Ok(crc32fast::hash(&bytes))
    }
}

/// Reads rows of a file, and checks every block that it takes them from.
pub(crate) struct RowsReader<'a> {
    path: PathBuf,
    layout: Layout<'a>,
    checksums: Vec<u8>,
    mover: Mover,
    piece: Piece,
    /// The number of the piece that is in `piece`; all its blocks are as they were written.
    held: Option<u64>,
    /// The piece that is on its way.
    ahead: Option<u64>,
    /// `None` while a piece is on its way.
    spare: Option<Piece>,
}

impl<'a> RowsReader<'a> {
    /// Checks what can be seen of a file before its rows are read; `layout` is what it must hold. Returns it, and its checksums.
    pub fn check(path: &Path, layout: Layout<'a>, named: &RowsFile) -> Result<(File, Vec<u8>)> {
        let file = File::open(path).map_err(|cause| match cause.kind() {
            ErrorKind::NotFound => corrupt(path, format_args!("the manifest names this file, but it is not there")),
            _ => refused("open", path, &cause),
        })?;
        let length = file.metadata().map_err(|cause| refused("look at", path, &cause))?.len();
        if length != layout.bytes() {
            return Err(corrupt(path, format_args!("the file has {length} bytes and must have {}", layout.bytes())));
        }
        let at = layout.checked_bytes();
        let mut checksums = zeros(&[4 * layout.blocks() as usize], "checksums")?;
        file.read_exact_at(&mut checksums, at).map_err(|cause| match cause.kind() {
            ErrorKind::UnexpectedEof => ends_early(path, length),
            _ => refused(&format!("read at byte {at} of"), path, &cause),
        })?;
        if crc32fast::hash(&checksums) != named.checksums_crc32 {
            return Err(corrupt(path, format_args!("the checksums from byte {at} on are not those that were written")));
        }
        Ok((file, checksums))
    }

    /// Opens a file that a manifest names. `once`: no other rank reads the same rows.
    pub fn open(path: &Path, layout: Layout<'a>, named: &RowsFile, once: bool) -> Result<RowsReader<'a>> {
        let (file, checksums) = RowsReader::check(path, layout, named)?;
        let (piece, spare) = (Piece::new()?, Some(Piece::new()?));
        let mover = Mover::new(file, Direction::Read { once });
        Ok(RowsReader { path: path.to_owned(), layout, checksums, mover, piece, held: None, ahead: None, spare })
    }

    /// Reads rows of the tensor with this number, from row `first` of the file on. `bytes` has whole elements.
    pub fn read(&mut self, tensor: usize, first: u64, bytes: &mut [u8]) -> Result<()> {
        let size = self.layout.tensors[tensor].dtype.size();
        let mut at = DATA + self.layout.begin(tensor) + size as u64 * first * self.layout.dim;
        let mut rest = &mut *bytes;
        while !rest.is_empty() {
            self.hold(at / PIECE as u64)?;
            let from = (at % PIECE as u64) as usize;
            let count = rest.len().min(PIECE - from);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&self.piece[from..from + count]);
            at += count as u64;
            rest = later;
        }
        swap_if_big_endian(bytes, size);
        Ok(())
    }

    /// Brings a piece into `piece`, and the one after it on its way.
    fn hold(&mut self, number: u64) -> Result<()> {
        if self.held == Some(number) {
            return Ok(());
        }
        self.held = None;
        if self.ahead != Some(number) {
            if self.ahead.is_some() {
                // Rows elsewhere in the file are wanted now, however that one went.
                let _ = self.end();
            }
            self.begin(number);
        }
        let moved = self.end();
        if self.length(number + 1) > 0 {
            self.begin(number + 1);
        }
        let at = number * PIECE as u64;
        let moved = moved.map_err(|cause| refused(&format!("read at byte {at} of"), &self.path, &cause))?;
        if moved < self.length(number) {
            return Err(ends_early(&self.path, at + self.length(number) as u64));
        }
        self.check_blocks(number)?;
        self.held = Some(number);
        Ok(())
    }

    /// Bytes of a piece that have checksums.
    fn length(&self, number: u64) -> usize {
        self.layout.checked_bytes().saturating_sub(number * PIECE as u64).min(PIECE as u64) as usize
    }

    fn begin(&mut self, number: u64) {
        let Some(spare) = self.spare.take() else { unreachable!("no piece is on its way") };
        self.mover.begin(spare, number * PIECE as u64, self.length(number));
        self.ahead = Some(number);
    }

    /// Waits for the piece that is on its way. It is in `piece` then.
    fn end(&mut self) -> std::io::Result<usize> {
        let (piece, moved) = self.mover.end();
        self.spare = Some(std::mem::replace(&mut self.piece, piece));
        self.ahead = None;
        moved
    }

    fn check_blocks(&self, number: u64) -> Result<()> {
        let first = number * (PIECE / BLOCK) as u64;
        for (block, bytes) in (first..).zip(self.piece[..self.length(number)].chunks(BLOCK)) {
            let word = block as usize * 4;
            let checksum = u32::from_le_bytes(self.checksums[word..word + 4].try_into().expect("four bytes"));
            if crc32fast::hash(bytes) != checksum {
                let at = block * BLOCK as u64;
                let end = at + bytes.len() as u64;
                return Err(corrupt(&self.path, format_args!("bytes {at} to {end} are not those that were written")));
            }
        }
        Ok(())
    }
}

fn ends_early(path: &Path, at: u64) -> Error {
    corrupt(path, format_args!("the file ends before byte {at}"))
}

/// To little-endian numbers of `size` bytes, or back.
pub(crate) fn swap_if_big_endian(bytes: &mut [u8], size: usize) {
    if cfg!(target_endian = "big") {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files of several pieces: their rows, read in any order, and dropped with a piece on its way.
    #[test]
    fn rows_are_read_in_any_order() {
        // An odd number of elements: a tensor of 2-byte ones is padded.
        for (dim, dtypes) in [(512, [DType::F32; 2]), (1023, [DType::Bf16, DType::F32]), (511, [DType::F32, DType::Bf16])] {
            let tensors = [Tensor { name: "weight", dtype: dtypes[0] }, Tensor { name: "momentum", dtype: dtypes[1] }];
            let layout = Layout { dim, rows: 3999, tensors: &tensors };
            let path = std::env::temp_dir().join(format!("partialfc-rows-{}-{dim}", std::process::id()));
            let row = |tensor: usize, row: u64| -> Vec<u8> {
                let bytes = layout.tensors[tensor].dtype.size() as u64 * dim;
                (0..bytes).map(|byte| (tensor as u64 * 77 + row * 31 + byte * 7 + row / 256) as u8).collect()
            };
            let mut writer = RowsWriter::create(&path, &layout).expect("a file");
            for tensor in 0..2 {
                (0..layout.rows).for_each(|number| writer.write(&row(tensor, number)).expect("a write"));
                writer.write(&[0; 4][..layout.padding(tensor)]).expect("a write");
            }
            let checksums_crc32 = writer.finish().expect("a file that is whole");
            let named = RowsFile { name: String::new(), first: 0, rows: layout.rows, checksums_crc32 };
            for once in [true, false] {
                let mut reader = RowsReader::open(&path, layout, &named, once).expect("the file");
                for (tensor, first) in [(0, 0), (1, 3996), (0, 2045), (0, 2046), (1, 100), (0, 0), (0, 3998 - 2), (1, 0)] {
                    let expected = [row(tensor, first), row(tensor, first + 1), row(tensor, first + 2)].concat();
                    let mut found = vec![0; expected.len()];
                    reader.read(tensor, first, &mut found).expect("rows");
                    assert!(found == expected, "tensor {tensor} from row {first}, {dtypes:?}");
                }
                assert!(reader.ahead.is_some());
            }
            std::fs::remove_file(&path).expect("the file");
        }
    }
}
