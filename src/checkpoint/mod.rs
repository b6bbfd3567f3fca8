//! Checkpoints on disk: a directory that holds one head, from any number of ranks and for any number of ranks.
//!
//! ```text
//! DIRECTORY/manifest.json                                      what is where, and how far the head was
//! DIRECTORY/rows-<generation>-<rank>-of-<ranks>.safetensors    the rows of one rank: weight, momentum, second_moment, checksums
//! ```
//!
//! A save writes files of a new generation beside those of the one before and then renames its manifest into place. That rename is the
//! commit: whenever a save is cut short, the manifest names files that are whole. `head/checkpoint.rs` has the order of a save and of a
//! load over the ranks; here is what a file looks like.

mod directory;
mod manifest;
mod rows_file;
mod transfer;

pub(crate) use directory::Directory;
pub(crate) use manifest::{Manifest, RowsFile, MANIFEST};
pub(crate) use rows_file::{swap_if_big_endian, Layout, RowsReader, RowsWriter, Tensor};

use std::path::Path;

use crate::{error, Error};

/// The error of a file that the system refuses to read or to write.
fn refused(what: &str, path: &Path, cause: &std::io::Error) -> Error {
    error!(Io, "cannot {what} {}: {cause}", path.display())
}

/// The error of a file that is not what was written.
fn corrupt(path: &Path, found: std::fmt::Arguments<'_>) -> Error {
    error!(Corrupt, "{}: {found}", path.display())
}
