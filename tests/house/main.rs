//! What the repository promises about itself: no cycle among the modules, files of a readable size, no test folder named in the
//! product, one vocabulary; and which commit it says it is of.

mod build_info;
mod cycles;
mod files;
