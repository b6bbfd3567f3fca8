//! Rows in bfloat16: what an update leaves of them, and that nothing but the rounding is another.

use half::bf16;
use partialfc::matrix::DType;
use partialfc::optimizer::Optimizer;
use partialfc::options::{HeadOptions, Placement, RowUpdate};
use partialfc::random::{rounding_key, Purpose};
use partialfc::rounding;
use partialfc::Status;
use partialfc_testing::capi::{
    on_cuda, options, plan, to_c, Comm, Device, Head, Rows, LEAST, PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT,
};
use partialfc_testing::numbers::{assert_close, relative_l2};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::safetensors;
use partialfc_testing::training::{assert_same_bits, train_step, ways_to_update, Trace};

use super::checkpoint::{assert_failure, folder};

const DIM: u32 = 67;
const STEPS: usize = 6;

fn base() -> HeadOptions {
    HeadOptions { sample_rate: 0.3, seed: 11, ..options(60, DIM, 8) }
}

fn stored(options: &HeadOptions, weight_dtype: DType, state_dtype: DType) -> HeadOptions {
    HeadOptions { weight_dtype, state_dtype, ..options.clone() }
}

fn has_second(options: &HeadOptions) -> bool {
    matches!(options.optimizer, Optimizer::Adamw(_))
}

/// W and the optimizer's state of this rank's shard.
fn tensors(head: &mut Head, options: &HeadOptions) -> Vec<Vec<f32>> {
    let mut all = vec![head.centers(), head.momentum()];
    if has_second(options) {
        all.push(head.second_moment());
    }
    all
}

fn write(head: &mut Head, tensors: &[Vec<f32>]) {
    let first = head.shard().0;
    head.write_centers(first, &tensors[0]).expect("class centers");
    for (tensor, rows) in [PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT].into_iter().zip(&tensors[1..]) {
        head.write_state(tensor, first, rows).expect("state");
    }
}

fn widened(stored: &[u16]) -> Vec<f32> {
    let mut row = vec![0.0; stored.len()];
    rounding::widen(stored, &mut row);
    row
}

fn nearest(rows: &[f32]) -> Vec<f32> {
    rows.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
}

/// What a head that stores float32 has after an update, as one that stores these types keeps it.
fn rounded(options: &HeadOptions, place: &Rank, update: u64, tensors: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let first = options.shard(place.size as u32, place.rank as u32).first;
    let purposes = [Some(Purpose::Weight), None, Some(Purpose::SecondMoment)];
    let dtypes = [options.weight_dtype, options.state_dtype, options.state_dtype];
    let kinds = purposes.into_iter().zip(dtypes);
    let one = |(rows, (purpose, dtype)): (Vec<f32>, (Option<Purpose>, DType))| -> Vec<f32> {
        if dtype == DType::F32 {
            return rows;
        }
        let row = |(class, row): (u64, &[f32])| -> Vec<f32> {
            let mut stored = vec![0; row.len()];
            let finite = match purpose {
                Some(purpose) => rounding::at_random(rounding_key(options.seed, class, update, purpose), row, &mut stored),
                None => rounding::to_nearest(row, &mut stored),
            };
            assert!(finite);
            widened(&stored)
        };
        (first..).zip(rows.chunks(DIM as usize)).flat_map(row).collect()
    };
    tensors.into_iter().zip(kinds).map(one).collect()
}

/// Step by step beside a head that stores float32 and begins each step where this one does.
#[test]
fn an_update_is_that_of_float32_rounded() {
    // On a GPU the update of float32 is part of a product where rows are sharded, and has roundings of its own.
    let alike = |options: &HeadOptions| !on_cuda() || options.placement == Placement::Replicated;
    let lazy = |options: &HeadOptions| options.row_update == RowUpdate::Lazy;
    for base in ways_to_update(&base()).into_iter().filter(|options| lazy(options) && alike(options)) {
        for (weight, state) in [(DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32), (DType::F32, DType::Bf16)] {
            let options = stored(&base, weight, state);
            on_ranks(2, |place| {
                let mut head = Head::new(&Device::under_test(2), &place.comm, &options);
                let mut wide = Head::new(&Device::under_test(2), &place.comm, &base);
                let start = if weight == DType::Bf16 { nearest(&wide.centers()) } else { wide.centers() };
                assert_eq!(head.centers(), start, "start values");
                for step in 0..STEPS {
                    let (mut found, mut expected) = (Trace::default(), Trace::default());
                    let before = tensors(&mut head, &options);
                    write(&mut wide, &before);
                    train_step(&mut head, place, &options, step, &mut found);
                    train_step(&mut wide, place, &base, step, &mut expected);
                    assert_eq!(found, expected, "{options:?}: step {step} before its update");
                    // Rows outside the sample hold what their type does, and rounding leaves that as it is.
                    let after = rounded(&options, place, step as u64 + 1, tensors(&mut wide, &options));
                    let now = tensors(&mut head, &options);
                    assert!(now == after, "{options:?}: rows after step {step}");
                    assert!(now != before, "{options:?}: step {step} has moved nothing");
                }
            });
        }
    }
}

fn trained(options: &HeadOptions, ranks: usize, threads: u32, steps: usize) -> Vec<Trace> {
    on_ranks(ranks, |place| {
        let mut head = Head::new(&Device::under_test(threads), &place.comm, options);
        let mut trace = Trace::default();
        (0..steps).for_each(|step| train_step(&mut head, place, options, step, &mut trace));
        trace.saw_rows(&mut head, options);
        trace
    })
}

#[test]
fn threads_do_not_change_the_bits() {
    for options in ways_to_update(&stored(&base(), DType::Bf16, DType::Bf16)) {
        let expected = trained(&options, 2, 1, STEPS);
        assert_same_bits(&format!("{options:?}"), &trained(&options, 2, 3, STEPS), &expected);
    }
}

/// Rounding is a walk without a direction: where a head ends is near where it would without.
#[test]
fn a_run_stays_near_that_of_float32() {
    for options in ways_to_update(&HeadOptions { sample_rate: 0.5, ..base() }) {
        let wide = trained(&options, 1, 2, 40).swap_remove(0);
        let narrow = trained(&stored(&options, DType::Bf16, DType::Bf16), 1, 2, 40).swap_remove(0);
        let start = Head::new(&Device::under_test(1), &Comm::solo(), &options).centers();
        let way = |trace: &Trace| trace.centers().iter().zip(&start).map(|(now, &then)| now - f64::from(then)).collect::<Vec<_>>();
        let apart = relative_l2(&way(&narrow), &way(&wide));
        // A unit in the last place is 0.8 % of a number, and some elements hardly move.
        assert!(apart > 0.0 && apart < 0.05, "{apart} of the way: {options:?}");
    }
}

/// The numerators are computed twice, by chunks: each has its own gradient of the class centers.
#[test]
fn a_sample_of_several_chunks_is_updated_by_each() {
    let whole = stored(&HeadOptions { sample_rate: 0.7, ..options(400, DIM, 8) }, DType::Bf16, DType::Bf16);
    let chunked = HeadOptions { workspace_limit: LEAST, ..whole.clone() };
    let [whole, chunked] = [whole, chunked].map(|options| trained(&options, 1, 2, 2).swap_remove(0));
    assert_eq!(whole.samples, chunked.samples);
    assert_close("class centers", &chunked.centers(), &whole.centers(), 1e-3);
}

#[test]
fn types_and_ranks_change_at_a_load() {
    for placement in [Placement::Sharded, Placement::Replicated] {
        let base = HeadOptions { placement, optimizer: partialfc_testing::training::ADAMW, ..base() };
        let folder = folder(&format!("types-{placement:?}"));
        let save = |ranks: usize, options: &HeadOptions, load: bool| -> (Vec<Vec<f32>>, (u64, u64)) {
            let ranks = on_ranks(ranks, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, options);
                match load {
                    true => head.load(&folder).expect("a load"),
                    false => (0..3).for_each(|step| train_step(&mut head, place, options, step, &mut Trace::default())),
                }
                head.save(&folder).expect("a save");
                (tensors(&mut head, options), head.read_progress().expect("progress"))
            });
            let progress = ranks[0].1;
            let shards = if placement == Placement::Sharded { ranks } else { ranks[..1].to_vec() };
            let whole = |number: usize| shards.iter().flat_map(|(tensors, _)| tensors[number].clone()).collect();
            ((0..3).map(whole).collect(), progress)
        };
        let (wide, progress) = save(1, &base, false);
        let narrow: Vec<Vec<f32>> = wide.iter().map(|tensor| nearest(tensor)).collect();
        assert!(narrow != wide);
        assert!(save(3, &stored(&base, DType::Bf16, DType::Bf16), true) == (narrow.clone(), progress), "{placement:?}");
        assert!(save(1, &base, true) == (narrow, progress), "{placement:?}: and back");
    }
}

/// A file of an odd number of bfloat16 before float32: both as safetensors has them.
#[test]
fn a_file_tells_its_types() {
    let options = stored(&HeadOptions { num_classes: 61, ..base() }, DType::Bf16, DType::F32);
    let folder = folder("types-of-a-file");
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &options);
    head.save(&folder).expect("a save");
    let bytes = std::fs::read(folder.join("rows-1-0-of-1.safetensors")).expect("the file");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let weight = file.tensor("weight").expect("weight");
    assert_eq!((weight.dtype(), weight.shape()), (safetensors::Dtype::BF16, &[61, DIM as usize][..]));
    let stored: Vec<u16> = weight.data().chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    assert_eq!(widened(&stored), head.centers());
    let momentum = file.tensor("momentum").expect("momentum");
    assert_eq!((momentum.dtype(), momentum.shape()), (safetensors::Dtype::F32, weight.shape()));
    let begin = momentum.data().as_ptr() as usize - bytes.as_ptr() as usize;
    assert!(begin.is_multiple_of(4), "momentum begins at byte {begin}");
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).expect("the manifest");
    assert!(manifest.contains("\"format\": 2") && manifest.contains("\"bf16\""), "{manifest}");
}

#[test]
fn what_is_given_is_rounded_to_nearest_and_what_does_not_fit_is_refused() {
    let options = stored(&base(), DType::Bf16, DType::Bf16);
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &options);
    let row: Vec<f32> = (0..DIM).map(|column| 1.0 + column as f32 / 3000.0).collect();
    head.write_centers(7, &row).expect("a row");
    assert_eq!(head.centers()[7 * DIM as usize..8 * DIM as usize], nearest(&row));
    let bad = vec![f32::MAX; DIM as usize];
    assert_failure("f32::MAX", head.write_centers(8, &bad), Status::InvalidArgument, &["row 0 (class 8)", "beyond bfloat16"]);
}

#[test]
fn an_update_beyond_bfloat16_names_the_class() {
    // In float32 the row would still be finite.
    let options = HeadOptions { sample_rate: 0.0, ..stored(&base(), DType::Bf16, DType::F32) };
    let most = bf16::MAX.to_f32();
    let mut head = Head::new(&Device::under_test(1), &Comm::solo(), &options);
    head.write_state(PFC_STATE_MOMENTUM, 9, &vec![-most / 1e3; DIM as usize]).expect("momentum");
    head.write_centers(9, &vec![most; DIM as usize]).expect("a row");
    let mut embeddings = Rows::f32(&vec![1.0; DIM as usize], DIM as usize);
    // A device tells it when it is waited for.
    let step = head.step(&mut embeddings, &[9], 1.0, &mut Rows::output(1, DIM as usize));
    let failure = step.and_then(|_| head.wait());
    assert_failure("an update", failure, Status::NotFinite, &["class center 9"]);
}

#[test]
fn bfloat16_takes_half_the_memory() {
    let base = options(1_000_000, 512, 128);
    let [wide, narrow] =
        [base.clone(), stored(&base, DType::Bf16, DType::Bf16)].map(|options| plan(&to_c(&options), 1, 128).expect("a plan"));
    assert_eq!((wide.weight_bytes, wide.state_bytes), (2_048_000_000, 2_048_000_000));
    assert_eq!((narrow.weight_bytes, narrow.state_bytes), (1_024_000_000, 1_024_000_000));
    assert_eq!(narrow.activation_bytes, wide.activation_bytes);
}
