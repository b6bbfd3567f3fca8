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

use super::transfer::{Direction, Mover, Piece, PIECE, SECTOR};
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

/// Writes a file, each tensor from front to back.
pub(crate) struct RowsWriter<'a> {
    path: PathBuf,
    layout: Layout<'a>,
    mover: Mover,
    /// `None` while a piece is on its way.
    spare: Option<Piece>,
    /// Where in the file the last piece on its way was to go.
    moved_to: u64,
    /// One for each tensor; the header is in the first.
    sections: Vec<Section>,
    /// For each block, or part of one that is in one section: where it begins, and its checksum.
    checksums: Vec<(u64, crc32fast::Hasher)>,
}

/// A part of the file that is written from front to back.
struct Section {
    /// Where in the file it begins, and where its next byte goes.
    begin: u64,
    at: u64,
    /// The piece of the file that `at` is in; the section's bytes of it begin at `first`.
    piece: Piece,
    first: usize,
    /// Bytes from `begin` to the first whole sector, once their piece is on its way.
    edge: Vec<u8>,
    /// Of its bytes from `checksum_at` on.
    checksum: crc32fast::Hasher,
    checksum_at: u64,
}

impl Section {
    fn new(begin: u64) -> Result<Section> {
        let mut edge = Vec::new();
        reserve(&mut edge, SECTOR, "the edge of a tensor")?;
        let (first, checksum) = ((begin % PIECE as u64) as usize, crc32fast::Hasher::new());
        Ok(Section { begin, at: begin, piece: Piece::new()?, first, edge, checksum, checksum_at: begin })
    }

    /// What is in the piece, and where it goes.
    fn rest(&self) -> (u64, &[u8]) {
        let end = (self.at % PIECE as u64) as usize;
        (self.at - (end - self.first) as u64, &self.piece[self.first..end])
    }
}

impl<'a> RowsWriter<'a> {
    pub fn create(path: &Path, layout: Layout<'a>) -> Result<RowsWriter<'a>> {
        let (mut sections, mut checksums) = (Vec::new(), Vec::new());
        reserve(&mut sections, layout.tensors.len(), "tensors")?;
        for number in 0..layout.tensors.len() {
            sections.push(Section::new(if number == 0 { 0 } else { DATA + layout.begin(number) })?);
        }
        reserve(&mut checksums, layout.blocks() as usize + sections.len(), "checksums")?;
        let spare = Some(Piece::new()?);
        let file = File::create(path).map_err(|cause| refused("create", path, &cause))?;
        reserve_room(&file, layout.bytes())
            .map_err(|cause| refused(&format!("reserve {} bytes for", layout.bytes()), path, &cause))?;
        let mover = Mover::new(file, Direction::Write);
        let mut writer = RowsWriter { path: path.to_owned(), layout, mover, spare, moved_to: 0, sections, checksums };
        writer.write(0, &layout.header())?;
        Ok(writer)
    }

    /// Writes what comes next of the tensor with this number.
    pub fn write(&mut self, tensor: usize, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let section = &mut self.sections[tensor];
            let filled = (section.at % PIECE as u64) as usize;
            let left = BLOCK - filled % BLOCK;
            let (now, rest) = bytes.split_at(left.min(bytes.len()));
            section.piece[filled..filled + now.len()].copy_from_slice(now);
            section.checksum.update(now);
            section.at += now.len() as u64;
            if now.len() == left {
                self.end_block(tensor);
            }
            if filled + now.len() == PIECE {
                self.begin_piece(tensor)?;
            }
            bytes = rest;
        }
        Ok(())
    }

    fn end_block(&mut self, tensor: usize) {
        let section = &mut self.sections[tensor];
        self.checksums.push((section.checksum_at, std::mem::take(&mut section.checksum)));
        section.checksum_at = section.at;
    }

    /// Sends a full piece on its way when the one before has arrived.
    fn begin_piece(&mut self, tensor: usize) -> Result<()> {
        self.end_piece()?;
        let Some(spare) = self.spare.take() else { unreachable!("the piece before has arrived") };
        let section = &mut self.sections[tensor];
        // The rest of a sector is another tensor's.
        let first = section.first.next_multiple_of(SECTOR);
        section.edge.extend_from_slice(&section.piece[section.first..first]);
        let at = section.at - PIECE as u64;
        self.mover.begin(std::mem::replace(&mut section.piece, spare), at, first..PIECE);
        (self.moved_to, section.first) = (at + first as u64, 0);
        Ok(())
    }

    fn end_piece(&mut self) -> Result<()> {
        if self.spare.is_none() {
            let (piece, result) = self.mover.end();
            self.spare = Some(piece);
            result.map_err(|cause| refused(&format!("write at byte {} of", self.moved_to), &self.path, &cause))?;
        }
        Ok(())
    }

    /// Writes the checksums, and waits until all is on the disk. Returns the checksum of the checksums.
    pub fn finish(mut self) -> Result<u32> {
        for tensor in 0..self.sections.len() {
            self.write(tensor, &[0; 4][..self.layout.padding(tensor)])?;
            let Section { at, checksum_at, .. } = self.sections[tensor];
            debug_assert_eq!(at, DATA + self.layout.begin(tensor + 1), "all rows of a tensor");
            if checksum_at < at {
                self.end_block(tensor);
            }
        }
        self.end_piece()?;
        let mut bytes = Vec::new();
        reserve(&mut bytes, 4 * self.layout.blocks() as usize, "checksums")?;
        self.checksums.sort_unstable_by_key(|&(at, _)| at);
        for block in self.checksums.chunk_by(|(one, _), (other, _)| one / BLOCK as u64 == other / BLOCK as u64) {
            let mut whole = block[0].1.clone();
            block[1..].iter().for_each(|(_, part)| whole.combine(part));
            bytes.extend(whole.finalize().to_le_bytes());
        }
        let file = self.mover.file();
        let edges = self.sections.iter().map(|section| (section.begin, &section.edge[..]));
        let rests = self.sections.iter().map(Section::rest);
        for (at, last) in edges.chain(rests).chain([(self.layout.checked_bytes(), &bytes[..])]) {
            file.write_all_at(last, at).map_err(|cause| refused(&format!("write at byte {at} of"), &self.path, &cause))?;
        }
        file.sync_all().map_err(|cause| refused("flush", &self.path, &cause))?;
        Ok(crc32fast::hash(&bytes))
    }
}

/// Reads rows of one tensor of a file, and checks every block that it takes them from.
pub(crate) struct RowsReader<'a> {
    path: PathBuf,
    layout: Layout<'a>,
    /// Its number.
    tensor: usize,
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

    /// Opens a file that a manifest names, for the tensor with this number. `once`: no other rank reads the same rows.
    pub fn open(path: &Path, layout: Layout<'a>, named: &RowsFile, tensor: usize, once: bool) -> Result<RowsReader<'a>> {
        let (file, checksums) = RowsReader::check(path, layout, named)?;
        let (piece, spare) = (Piece::new()?, Some(Piece::new()?));
        let mover = Mover::new(file, Direction::Read { once });
        Ok(RowsReader { path: path.to_owned(), layout, tensor, checksums, mover, piece, held: None, ahead: None, spare })
    }

    /// Reads rows from row `first` of the file on. `bytes` has whole elements.
    pub fn read(&mut self, first: u64, bytes: &mut [u8]) -> Result<()> {
        let size = self.layout.tensors[self.tensor].dtype.size();
        let mut at = DATA + self.layout.begin(self.tensor) + size as u64 * first * self.layout.dim;
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
        let (at, next) = (number * PIECE as u64, (number + 1) * PIECE as u64);
        if next < DATA + self.layout.begin(self.tensor) + self.layout.tensor_bytes(self.tensor) {
            self.begin(number + 1);
        }
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
        self.mover.begin(spare, number * PIECE as u64, 0..self.length(number));
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
mod tests;
