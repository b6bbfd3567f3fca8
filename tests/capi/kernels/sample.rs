//! The draw against its definition: the positives, then the smallest (key, id), keys from Philox written down anew.

use std::ptr::{null, null_mut};

use partialfc::capi::kernels::pfc_sample_classes;

use super::{assert_refused, device, lend};
use partialfc_testing::capi::{outcome, Device, Outcome};
use partialfc_testing::numbers::Random;

/// Philox4x32-10, from the paper.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (u64::from(counter[0]) * 0xD251_1F53, u64::from(counter[2]) * 0xCD9E_8D57);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[test]
fn philox_is_the_published_one() {
    // Known answers of the authors' Random123 library.
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
}

/// Word c mod 4 of Philox with key = seed and counter = (lo, hi of c / 4, step lo, step hi); sampling is purpose 0.
fn key(seed: u64, step: u64, class: u64) -> u32 {
    let counter = [(class / 4) as u32, ((class / 4) >> 32) as u32, step as u32, (step >> 32) as u32];
    philox(counter, [seed as u32, (seed >> 32) as u32])[(class % 4) as usize]
}

struct Ask<'a> {
    seed: u64,
    step: u64,
    first: u64,
    rows: u64,
    positives: &'a [i64],
    size: u64,
}

fn expected(ask: &Ask) -> Vec<i64> {
    let classes = ask.first..ask.first + ask.rows;
    let mut negatives: Vec<(u32, u64)> = classes
        .filter(|&class| ask.positives.binary_search(&(class as i64)).is_err())
        .map(|class| (key(ask.seed, ask.step, class), class))
        .collect();
    negatives.sort_unstable();
    let wanted = (ask.size as usize).saturating_sub(ask.positives.len());
    let mut ids: Vec<i64> = ask.positives.to_vec();
    ids.extend(negatives[..wanted].iter().map(|&(_, class)| class as i64));
    ids.sort_unstable();
    ids
}

fn draw(device: &Device, ask: &Ask) -> Outcome<Vec<i64>> {
    let capacity = ask.positives.len().max(ask.size as usize);
    let mut ids = vec![-5i64; capacity + 1];
    let mut count = u64::MAX;
    // SAFETY: a live device, ids of the capacity that the function names.
    lend(|l| unsafe {
        let (positives, number) = (l.list(ask.positives), ask.positives.len() as u64);
        let to = l.array(&mut ids);
        let Ask { seed, step, first, rows, size, .. } = *ask;
        outcome(pfc_sample_classes(device.0, seed, step, first, rows, positives, number, size, to, &mut count))
    })?;
    assert_eq!(ids[capacity], -5, "written beyond the capacity");
    ids.truncate(count as usize);
    Ok(ids)
}

#[test]
fn the_draw_is_the_positives_and_the_smallest_keys() {
    let devices = [device(1), device(3)];
    let mut random = Random(4);
    let shards = [
        (0u64, 1u64),
        (3, 61),
        (1 << 33, 5000),
        (65_535, 3),
        (0, 64),
        (1, 2),
        (1000, 999),
        (7, 65_536),
        (0, 65_537),
        (123, 200_001),
    ];
    for (first, rows) in shards {
        for size in [0, 1, rows / 10, rows / 2, rows.saturating_sub(1), rows] {
            for positive_count in [0usize, 1, 20] {
                let mut positives: Vec<i64> = (0..positive_count).map(|_| (first + random.bits() % rows) as i64).collect();
                positives.sort_unstable();
                positives.dedup();
                let (seed, step) = (random.bits(), random.bits() >> 20);
                let ask = Ask { seed, step, first, rows, positives: &positives, size };
                let expected = expected(&ask);
                for device in &devices {
                    let found = draw(device, &ask).expect("a draw");
                    assert_eq!(
                        found, expected,
                        "seed {seed} step {step} first {first} rows {rows} size {size} positives {positives:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn positives_that_outnumber_the_sample_are_the_sample() {
    let positives = [2, 3, 5, 8, 13];
    let ask = Ask { seed: 1, step: 2, first: 0, rows: 20, positives: &positives, size: 3 };
    assert_eq!(draw(&device(1), &ask).expect("a draw"), positives);
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let device = device(1);
    let ask = |positives: &[i64], size| draw(&device, &Ask { seed: 1, step: 2, first: 10, rows: 20, positives, size }).map(|_| ());
    assert_refused("not ascending", ask(&[12, 11], 5), &["positives[1]", "11"]);
    assert_refused("repeated", ask(&[12, 12], 5), &["positives[1]", "12"]);
    assert_refused("foreign", ask(&[9], 5), &["positives[0]", "9"]);
    assert_refused("foreign", ask(&[15, 30], 5), &["positives[1]", "30"]);
    assert_refused("negative", ask(&[-1], 5), &["positives[0]", "-1"]);
    assert_refused("more than there are", ask(&[], 21), &["sample_size", "21", "20"]);
    // SAFETY: a live device; wrong arguments are refused before memory is touched.
    unsafe {
        let (mut ids, mut count) = ([0i64; 5], 0u64);
        let refused = outcome(pfc_sample_classes(device.0, 1, 2, 0, 20, null(), 2, 5, ids.as_mut_ptr(), &mut count));
        assert_refused("no positives", refused, &["positives", "2"]);
        let refused = outcome(pfc_sample_classes(device.0, 1, 2, 0, 20, null(), 0, 5, null_mut(), &mut count));
        assert_refused("no ids", refused, &["ids"]);
        let refused = outcome(pfc_sample_classes(device.0, 1, 2, 0, 20, null(), 0, 5, ids.as_mut_ptr(), null_mut()));
        assert_refused("no count", refused, &["count"]);
        let refused = outcome(pfc_sample_classes(device.0, 1, 2, u64::MAX - 3, 20, null(), 0, 5, ids.as_mut_ptr(), &mut count));
        assert_refused("classes beyond the numbers", refused, &["first"]);
    }
}
