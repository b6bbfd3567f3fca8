//! The rows of one rank: a safetensors file with a checksum for each MiB of it.
//!
//! ```text
//! 8 bytes       length of the header, little-endian
//! header        JSON, padded with spaces to `DATA` bytes in all
//! weight        [rows, d] F32, then the optimizer's tensors, alike
//! checksums     U32: the CRC-32 of each `BLOCK` bytes before it, from the start of the file; the last block may be shorter
//! ```

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{corrupt, refused, RowsFile};
use crate::memory::{reserve, zeros};
use crate::Result;

/// Bytes of a block with a checksum of its own.
const BLOCK: usize = 1 << 20;
/// Where the tensors begin.
const DATA: u64 = 4096;

/// What is in a file of rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout<'a> {
    pub dim: u64,
    pub rows: u64,
    /// In the order of the file.
    pub tensors: &'a [&'static str],
}

impl Layout<'_> {
    fn tensor_bytes(&self) -> u64 {
        4 * self.rows * self.dim
    }

    /// Bytes that have checksums.
    fn checked_bytes(&self) -> u64 {
        DATA + self.tensors.len() as u64 * self.tensor_bytes()
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
        let end = |number: usize| number as u64 * self.tensor_bytes();
        let tensor = |(number, name): (usize, &&str)| {
            format!(
                "\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{},{}],\"data_offsets\":[{},{}]}},",
                self.rows,
                self.dim,
                end(number),
                end(number + 1)
            )
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
    file: File,
    path: PathBuf,
    written: u64,
    checksum: crc32fast::Hasher,
    checksums: Vec<u32>,
}

impl RowsWriter {
    pub fn create(path: &Path, layout: &Layout<'_>) -> Result<RowsWriter> {
        let mut checksums = Vec::new();
        reserve(&mut checksums, layout.blocks() as usize, "checksums")?;
        let file = File::create(path).map_err(|cause| refused("create", path, &cause))?;
        let mut writer = RowsWriter { file, path: path.to_owned(), written: 0, checksum: crc32fast::Hasher::new(), checksums };
        writer.write(&layout.header())?;
        Ok(writer)
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.write_unchecked(bytes)?;
        while !bytes.is_empty() {
            let room = BLOCK - self.written as usize % BLOCK;
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.checksum.update(now);
            self.written += now.len() as u64;
            if now.len() == room {
                self.end_block();
            }
            bytes = rest;
        }
        Ok(())
    }

    fn write_unchecked(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|cause| refused(&format!("write at byte {} of", self.written), &self.path, &cause))
    }

    fn end_block(&mut self) {
        self.checksums.push(std::mem::take(&mut self.checksum).finalize());
    }

    /// Writes the checksums, and waits until all is on the disk. Returns the checksum of the checksums.
    pub fn finish(mut self) -> Result<u32> {
        if !(self.written as usize).is_multiple_of(BLOCK) {
            self.end_block();
        }
        let mut bytes = Vec::new();
        reserve(&mut bytes, 4 * self.checksums.len(), "checksums")?;
        bytes.extend(self.checksums.iter().flat_map(|checksum| checksum.to_le_bytes()));
        self.write_unchecked(&bytes)?;
        self.file.sync_all().map_err(|cause| refused("flush", &self.path, &cause))?;
        Ok(crc32fast::hash(&bytes))
    }
}

/// Reads rows of a file, and checks every block that it takes them from.
pub(crate) struct RowsReader<'a> {
    file: File,
    path: PathBuf,
    layout: Layout<'a>,
    checksums: Vec<u8>,
    block: Vec<u8>,
    /// The number of the block that is in `block`.
    held: Option<u64>,
}

impl<'a> RowsReader<'a> {
    /// Opens a file that a manifest names; `layout` is what it must hold.
    pub fn open(path: &Path, layout: Layout<'a>, named: &RowsFile) -> Result<RowsReader<'a>> {
        let file = File::open(path).map_err(|cause| match cause.kind() {
            ErrorKind::NotFound => corrupt(path, format_args!("the manifest names this file, but it is not there")),
            _ => refused("open", path, &cause),
        })?;
        let length = file.metadata().map_err(|cause| refused("look at", path, &cause))?.len();
        if length != layout.bytes() {
            return Err(corrupt(path, format_args!("the file has {length} bytes and must have {}", layout.bytes())));
        }
        let mut reader = RowsReader {
            file,
            path: path.to_owned(),
            layout,
            checksums: zeros(&[4 * layout.blocks() as usize], "checksums")?,
            block: zeros(&[BLOCK], "a block of a checkpoint")?,
            held: None,
        };
        let at = layout.checked_bytes();
        let mut checksums = std::mem::take(&mut reader.checksums);
        reader.read_at(at, &mut checksums)?;
        if crc32fast::hash(&checksums) != named.checksums_crc32 {
            return Err(corrupt(path, format_args!("the checksums from byte {at} on are not those that were written")));
        }
        reader.checksums = checksums;
        Ok(reader)
    }

    /// Reads rows of the tensor with this number, from row `first` of the file on.
    pub fn read(&mut self, tensor: usize, first: u64, rows: &mut [f32]) -> Result<()> {
        let mut at = DATA + tensor as u64 * self.layout.tensor_bytes() + 4 * first * self.layout.dim;
        // SAFETY: floats without padding, of which every bit pattern is a value.
        let (_, mut bytes, _) = unsafe { rows.align_to_mut::<u8>() };
        while !bytes.is_empty() {
            let number = at / BLOCK as u64;
            self.hold(number)?;
            let from = (at % BLOCK as u64) as usize;
            let count = bytes.len().min(BLOCK - from);
            let (now, rest) = bytes.split_at_mut(count);
            now.copy_from_slice(&self.block[from..from + count]);
            at += count as u64;
            bytes = rest;
        }
        if cfg!(target_endian = "big") {
            rows.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
        }
        Ok(())
    }

    /// Brings a block into `block`.
    fn hold(&mut self, number: u64) -> Result<()> {
        if self.held == Some(number) {
            return Ok(());
        }
        self.held = None;
        let at = number * BLOCK as u64;
        let length = (self.layout.checked_bytes() - at).min(BLOCK as u64) as usize;
        let mut block = std::mem::take(&mut self.block);
        let read = self.read_at(at, &mut block[..length]);
        self.block = block;
        read?;
        let word = number as usize * 4;
        let checksum = u32::from_le_bytes(self.checksums[word..word + 4].try_into().expect("four bytes"));
        if crc32fast::hash(&self.block[..length]) != checksum {
            let end = at + length as u64;
            return Err(corrupt(&self.path, format_args!("bytes {at} to {end} are not those that were written")));
        }
        self.held = Some(number);
        Ok(())
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(|cause| match cause.kind() {
            ErrorKind::UnexpectedEof => corrupt(&self.path, format_args!("the file ends before byte {}", at + bytes.len() as u64)),
            _ => refused(&format!("read at byte {at} of"), &self.path, &cause),
        })
    }
}

/// Little-endian bytes of some numbers, in place.
pub(crate) fn as_bytes(values: &mut [f32]) -> &[u8] {
    if cfg!(target_endian = "big") {
        values.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
    }
    // SAFETY: floats without padding are bytes.
    unsafe { values.align_to::<u8>().1 }
}
