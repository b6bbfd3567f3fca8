//! Sizes of files, folders that the product does not name, and words that are no longer used.

use std::fs;
use std::process::Command;

/// A file of more lines is two.
const MOST_LINES: usize = 600;
const TEST_FOLDERS: [&str; 3] = ["ctests/", "testing/", "tests/"];

/// Words that had several meanings or none: CONTRIBUTING's glossary has what is said now. In the product's sources.
const RETIRED_IN_SOURCES: [&str; 17] = [
    "at_labels",
    "fn admit",
    "fn apart",
    "fn far",
    "fn holds",
    "fn late",
    "fn reaches",
    "fn settle",
    "fn settled",
    "fn told",
    "forgive",
    "heard",
    "helpless",
    "parted",
    "self.late",
    "self.told",
    "survive",
];
/// The same, in every file.
const RETIRED: [&str; 30] = [
    "Carrier",
    "Carve",
    "Cut",
    "Entered",
    "HeadView",
    "LATE_LOSS",
    "Lane",
    "Lanes",
    "Lent",
    "Moment",
    "Ran",
    "Room",
    "StepRule",
    "ThreadEnd",
    "Told",
    "are not to be had",
    "carrier",
    "carriers",
    "forgive_last",
    "multiply_units",
    "others_late",
    "put_off",
    "rest1",
    "rest2",
    "survive_judged",
    "survive_update",
    "synchronise",
    "synchronised",
    "synchronises",
    "unpacked",
];
/// They may have any word: what has been is history, and the lists above.
const EXEMPT: [&str; 2] = ["CHANGELOG.md", "tests/house/files.rs"];

/// The files that git knows, that are there, and that are text.
fn tracked() -> Vec<(String, String)> {
    let listed = Command::new("git").args(["ls-files", "-z"]).output().expect("git");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).expect("names in UTF-8");
    let files = names.split_terminator('\0').filter(|name| !name.ends_with(".safetensors"));
    files.filter_map(|name| Some((name.to_owned(), fs::read_to_string(name).ok()?))).collect()
}

fn of_the_product(name: &str) -> bool {
    name.starts_with("src/") || name.starts_with("kernels/")
}

/// Asserts that nothing was found, or shows all of it.
fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// Where a word stands as a whole one.
fn whole<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

/// `name:line: what stands there` for each place of a text.
fn shown(name: &str, text: &str, at: usize) -> String {
    let line = text[..at].matches('\n').count();
    format!("{name}:{}: {}", line + 1, text.lines().nth(line).unwrap_or("").trim())
}

#[test]
fn no_file_of_the_product_is_too_long() {
    let files = tracked();
    let long = files.iter().filter(|(name, _)| of_the_product(name)).filter_map(|(name, text)| {
        let lines = text.lines().count();
        (lines > MOST_LINES).then(|| format!("{name}: {lines} lines"))
    });
    assert_none("files of more than 600 lines", &long.collect::<Vec<_>>());
}

#[test]
fn the_product_names_no_test_folder() {
    let mut found = Vec::new();
    for (name, text) in tracked().iter().filter(|(name, _)| of_the_product(name)) {
        for folder in TEST_FOLDERS {
            let starts = text.match_indices(folder).map(|(at, _)| at);
            found.extend(starts.filter(|&at| !text[..at].ends_with(char::is_alphanumeric)).map(|at| shown(name, text, at)));
        }
    }
    assert_none("test folders that the product names", &found);
}

/// A program with rights that its user lacks must not take the user's settings: one file sees to that.
#[test]
fn one_file_reads_the_environment_when_a_program_runs() {
    let mut found = Vec::new();
    for (name, text) in tracked().iter().filter(|(name, _)| name.starts_with("src/") && name != "src/environment.rs") {
        let product = text.split("#[cfg(test)]\nmod ").next().unwrap_or("");
        if !name.ends_with("/tests.rs") {
            found.extend(product.match_indices("env::var").map(|(at, _)| shown(name, text, at)));
        }
    }
    assert_none("reads of the environment beside src/environment.rs", &found);
}

#[test]
fn retired_words_are_gone() {
    let mut found = Vec::new();
    for (name, text) in tracked().iter().filter(|(name, _)| !EXEMPT.contains(&name.as_str())) {
        let more: &[&str] = if of_the_product(name) { &RETIRED_IN_SOURCES } else { &[] };
        for word in RETIRED.iter().chain(more) {
            found.extend(whole(text, word).map(|at| format!("{word}: {}", shown(name, text, at))));
        }
    }
    found.sort();
    assert_none("retired words", &found);
}

#[test]
fn a_word_is_found_as_a_whole_one() {
    assert_eq!(whole("told, untold; Told_ told", "told").collect::<Vec<_>>(), [0, 20]);
}
