//! A rank of several that comes with what no step can use, on a GPU and on the CPU: the same verdict on every rank, naming the rank,
//! nobody waits for anybody, and the head works on where it should.
//!
//! On the emulator, or with `PFC_TEST_DRIVER=real` on a GPU, which all ranks share.

use std::ffi::c_void;
use std::ptr::null;

use partialfc::capi::head as c_head;
use partialfc::capi::types::pfc_matrix;
use partialfc::options::{HeadOptions, Placement, Precision};
use partialfc::Status;
use partialfc_testing::capi::{options, outcome, status_name, Device, Failure, Head, Outcome, Rows};
use partialfc_testing::emulator;
use partialfc_testing::gpu::{gpu, Remote};
use partialfc_testing::numbers::{assert_close, widen, Random};
use partialfc_testing::ranks::{on_ranks, Rank};

const ROWS: usize = 3;
const DIM: usize = 5;
const CLASSES: u64 = 12;
const RATE: f64 = 0.1;

/// What one rank does wrong. The first ones leave the head usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    NoEmbeddings,
    NoLabels,
    NoLoss,
    NoLossAfterPrepare,
    TooManyRows,
    WrongType,
    LabelOutOfRange,
    NotANumber,
    OtherRowsThanPrepared,
    OtherLabelsThanPrepared,
    /// The rank's own: nothing comes of it for the others, nor for the step.
    SampleOutOfOrder,
    /// Replicated ranks are to have the same ids.
    AnotherSample,
}

impl Fault {
    const ALL: [Fault; 12] = [
        Fault::NoEmbeddings,
        Fault::NoLabels,
        Fault::NoLoss,
        Fault::NoLossAfterPrepare,
        Fault::TooManyRows,
        Fault::WrongType,
        Fault::LabelOutOfRange,
        Fault::NotANumber,
        Fault::OtherRowsThanPrepared,
        Fault::OtherLabelsThanPrepared,
        Fault::SampleOutOfOrder,
        Fault::AnotherSample,
    ];

    fn prepares(self) -> bool {
        matches!(self, Fault::NoLossAfterPrepare | Fault::OtherRowsThanPrepared | Fault::OtherLabelsThanPrepared)
    }

    /// Whether ranks of this placement and number can have it.
    fn is_possible(self, placement: Placement, ranks: usize) -> bool {
        self != Fault::AnotherSample || (placement == Placement::Replicated && ranks > 1)
    }

    /// The status on the rank that fails, and on the others.
    fn statuses(self) -> [Option<Status>; 2] {
        match self {
            Fault::LabelOutOfRange => [Some(Status::Label); 2],
            Fault::NotANumber => [Some(Status::NotFinite); 2],
            Fault::AnotherSample => [Some(Status::Mismatch); 2],
            Fault::SampleOutOfOrder => [None; 2],
            _ => [Some(Status::InvalidArgument), Some(Status::Remote)],
        }
    }
}

/// Where a run is, and where its losses and arrays are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Cpu,
    HostLoss,
    DeviceLoss,
}

/// An array of the host's, or a copy of it on the GPU.
enum Array {
    Host(Rows),
    Device(Remote, Rows),
}

impl Array {
    fn new(rows: Rows, remote: bool) -> Array {
        match remote {
            true => Array::Device(Remote::of(&rows.values_f32()), rows),
            false => Array::Host(rows),
        }
    }

    fn view(&mut self) -> pfc_matrix {
        match self {
            Array::Host(rows) => rows.view(),
            Array::Device(remote, rows) => pfc_matrix { data: remote.address as *mut c_void, ..rows.view() },
        }
    }

    fn values(&self) -> Vec<f32> {
        match self {
            Array::Host(rows) => rows.values_f32(),
            Array::Device(remote, _) => remote.read(),
        }
    }
}

/// What a rank saw of a step: from each call in turn, until one tells that the step is over.
struct Seen {
    forward: Outcome<()>,
    backward: Outcome<()>,
    update: Outcome<()>,
    wait: Outcome<()>,
    loss: f64,
    gradient: Vec<f32>,
}

/// One step as a trainer makes it; with a fault of one rank's, if there is to be one.
fn step(head: &Head, place: &Rank, run: Where, number: u64, fault: Option<(Fault, usize)>) -> Seen {
    let mut random = Random(1000 * number + place.rank as u64);
    let mut labels = random.labels(ROWS + 1, CLASSES as usize);
    let mut values = random.normals((ROWS + 1) * DIM, 1.0);
    let mut count = ROWS;
    let remote = run != Where::Cpu && (number + place.rank as u64).is_multiple_of(2);
    // All ranks do, or none.
    let prepares = fault.map_or(number.is_multiple_of(2), |(fault, _)| fault.prepares());
    let fault = fault.filter(|&(_, failing)| failing == place.rank).map(|(fault, _)| fault);
    match fault {
        Some(Fault::TooManyRows | Fault::OtherRowsThanPrepared) => count += 1,
        Some(Fault::LabelOutOfRange) => labels[1] = CLASSES as i64,
        Some(Fault::NotANumber) => values[2 * DIM + 1] = f32::NAN,
        _ => {}
    }
    let mut embeddings = Array::new(Rows::f32(&values[..count * DIM], DIM), remote);
    let mut gradient = Array::new(Rows::output(count, DIM), remote);
    let mut matrix = embeddings.view();
    if fault == Some(Fault::WrongType) {
        matrix.dtype = 9;
    }
    if fault == Some(Fault::SampleOutOfOrder) {
        // SAFETY: a live head; two ids.
        let refused = outcome(unsafe { c_head::pfc_head_set_sample(head.raw, [3i64, 2].as_ptr(), 2) }).expect_err("out of order");
        assert_eq!(status_name(refused.status), status_name(Status::InvalidArgument as i32));
        assert!(refused.message.contains(&format!("rank {}", place.rank)), "{refused:?}");
    }
    if prepares {
        // SAFETY: a live head; labels are copied.
        outcome(unsafe { c_head::pfc_head_prepare(head.raw, labels.as_ptr(), ROWS as u64) }).expect("good labels");
    }
    if fault == Some(Fault::OtherLabelsThanPrepared) {
        labels[2] = (labels[2] + 1) % CLASSES as i64;
    }
    let remote_labels = (remote && !prepares).then(|| Remote::of(&labels[..count]));
    let label_pointer = match (&remote_labels, fault) {
        (_, Some(Fault::NoLabels)) => null(),
        (Some(there), _) => there.address as *const i64,
        (None, _) => labels.as_ptr(),
    };
    let late_loss = (run == Where::DeviceLoss).then(|| Remote::of(&[-321f64]));
    let mut loss = -321.0;
    let loss_pointer = match (&late_loss, fault) {
        (_, Some(Fault::NoLoss | Fault::NoLossAfterPrepare)) => std::ptr::null_mut(),
        (Some(there), _) => there.address as *mut f64,
        (None, _) => &mut loss,
    };
    let matrix_pointer: *const pfc_matrix = if fault == Some(Fault::NoEmbeddings) { null() } else { &matrix };
    let target = gradient.view();
    // SAFETY: a live head; what is not NULL is an array of the size that it says, until after the wait.
    let [forward, backward, update, wait] = 'calls: {
        unsafe {
            let (embeddings, wait) = (matrix_pointer, || outcome(c_head::pfc_head_wait(head.raw)));
            if number.is_multiple_of(3) {
                // All of it in one call.
                let whole = outcome(c_head::pfc_head_step(head.raw, embeddings, label_pointer, RATE, &target, loss_pointer));
                break 'calls [whole.clone(), whole.clone(), whole, wait()];
            }
            let forward = outcome(c_head::pfc_head_forward(head.raw, embeddings, label_pointer, loss_pointer));
            let over = forward.is_err() && run != Where::DeviceLoss;
            let or_over = |call: &dyn Fn() -> i32| if over { Ok(()) } else { outcome(call()) };
            let backward = or_over(&|| c_head::pfc_head_backward(head.raw, 1.0, 1.0, &target));
            let update = or_over(&|| c_head::pfc_head_update(head.raw, RATE));
            [forward, backward, update, wait()]
        }
    };
    if let Some(there) = &late_loss {
        loss = there.read()[0];
    }
    Seen { forward, backward, update, wait, loss, gradient: gradient.values() }
}

/// Asserts what a rank saw of a step in which rank `failing` had the fault.
fn judge(what: &str, seen: &Seen, run: Where, fault: Fault, failing: usize, rank: usize) {
    let expected = fault.statuses()[usize::from(rank != failing)];
    let untouched = |values: &[f32]| values.iter().all(|&g| g == -123.0);
    let Some(expected) = expected else {
        let all = [&seen.forward, &seen.backward, &seen.update, &seen.wait];
        assert!(all.iter().all(|call| call.is_ok()), "{what}: {all:?}");
        return assert!(seen.loss > 0.0 && !untouched(&seen.gradient), "{what}");
    };
    let is_it = |call: &str, failure: &Failure| {
        assert_eq!(status_name(failure.status), format!("PFC_ERROR_{expected}"), "{what}, {call}: {failure:?}");
        let named = failure.message.contains(&format!("rank {failing}"));
        assert!(named, "{what}, {call}: the text does not name rank {failing}: {failure:?}");
    };
    if run != Where::DeviceLoss {
        is_it("forward", seen.forward.as_ref().expect_err(what));
        seen.wait.as_ref().unwrap_or_else(|again| panic!("{what}: told twice: {again:?}"));
        return assert!(seen.loss == -321.0 && untouched(&seen.gradient), "{what}: an output was written");
    }
    let late = seen.wait.as_ref().expect_err(what);
    is_it("wait", late);
    assert!(late.message.starts_with("step "), "{what}: {late:?}");
    if expected == Status::InvalidArgument {
        // Its own mistake: known at once, and nothing of the step is written. It made the calls that its peers made.
        for (call, outcome) in [("forward", &seen.forward), ("backward", &seen.backward), ("update", &seen.update)] {
            is_it(call, outcome.as_ref().expect_err(what));
        }
        assert!(untouched(&seen.gradient), "{what}: a gradient was written");
    } else {
        let calls = [&seen.forward, &seen.backward, &seen.update];
        assert!(calls.iter().all(|call| call.is_ok()), "{what}: known too early: {calls:?}");
        assert!(seen.loss.is_nan(), "{what}: the loss is {}", seen.loss);
        assert!(seen.gradient.iter().all(|&g| g == 0.0), "{what}: {:?}", seen.gradient);
    }
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

fn device_of(run: Where) -> Device {
    match run {
        Where::Cpu => Device::cpu(1),
        Where::HostLoss | Where::DeviceLoss => gpu(),
    }
}

/// Every fault of every rank in turn, between two good steps: what the class centers are at the end.
fn train_through_faults(options: &HeadOptions, ranks: usize, run: Where) -> Vec<f32> {
    on_ranks(ranks, |place| {
        let device = device_of(run);
        let mut head = Head::new(&device, &place.comm, options);
        let good = |head: &Head, number| {
            let seen = step(head, place, run, number, None);
            for call in [seen.forward, seen.backward, seen.update, seen.wait] {
                call.unwrap_or_else(|e| panic!("{run:?}, a good step: {e:?}"));
            }
        };
        good(&head, 1);
        let (mut number, mut samples) = (1, Vec::new());
        for fault in Fault::ALL {
            // Of those that touch the step, the one that moves the rows comes with the good steps below.
            if !fault.is_possible(options.placement, ranks) || fault == Fault::SampleOutOfOrder {
                continue;
            }
            // Of four ranks the first and the last.
            for failing in (0..ranks).filter(|&rank| ranks < 4 || rank % 3 == 0) {
                number += 1;
                let before = (bits(head.centers()), bits(head.momentum()));
                let what = format!("{run:?} {:?} {fault:?} of rank {failing} of {ranks}, rank {}", options.placement, place.rank);
                if fault == Fault::AnotherSample {
                    head.set_sample(if place.rank == failing { &[1, 5] } else { &[1, 4] }).expect("a sample by itself");
                }
                let seen = step(&head, place, run, number, Some((fault, failing)));
                judge(&what, &seen, run, fault, failing, place.rank);
                let after = (bits(head.centers()), bits(head.momentum()));
                assert!(before == after, "{what}: rows have moved");
                let metrics = head.metrics().expect("metrics");
                assert_eq!(metrics.updates, 1, "{what}");
                samples.push(metrics.draws);
            }
        }
        let seen = step(&head, place, run, number + 1, Some((Fault::SampleOutOfOrder, ranks - 1)));
        judge(&format!("{run:?} {ranks} ranks"), &seen, run, Fault::SampleOutOfOrder, ranks - 1, place.rank);
        good(&head, number + 2);
        (head.centers(), samples)
    })
    .into_iter()
    .reduce(|(mut all, samples), (centers, others)| {
        assert_eq!(samples, others, "{run:?}: the ranks have drawn different numbers of samples");
        all.extend(centers);
        (all, samples)
    })
    .map(|(all, _)| all)
    .expect("a rank")
}

fn every_rank_hears(placement: Placement, sample_rate: f64) {
    for ranks in 1..=4 {
        let options = HeadOptions { placement, sample_rate, ..options(CLASSES, DIM as u32, ROWS as u64) };
        let on_cpu = train_through_faults(&options, ranks, Where::Cpu);
        let mut options = options;
        options.precision = Precision::F32;
        let turn = emulator::turn(ranks as u64);
        let on_gpu = [Where::HostLoss, Where::DeviceLoss].map(|run| train_through_faults(&options, ranks, run));
        drop(turn);
        assert_eq!(bits(on_gpu[0].clone()), bits(on_gpu[1].clone()), "{placement:?}, {ranks} ranks: where the loss is");
        assert_close(&format!("{placement:?}, {ranks} ranks"), &widen(&on_gpu[0]), &widen(&on_cpu), 1e-5);
    }
}

#[test]
fn every_rank_of_a_sharded_head_hears_of_every_fault_of_every_rank() {
    every_rank_hears(Placement::Sharded, 1.0);
}

#[test]
fn every_rank_of_a_replicated_head_hears_of_every_fault_of_every_rank() {
    every_rank_hears(Placement::Replicated, 0.0);
}

/// Ranks that are at different steps never come together again: poisoned, on all of them.
#[test]
fn ranks_at_different_steps_are_poisoned_whatever_the_loss() {
    let _turn = emulator::turn(3);
    for placement in [Placement::Sharded, Placement::Replicated] {
        for run in [Where::Cpu, Where::HostLoss, Where::DeviceLoss] {
            on_ranks(3, |place| {
                let options = HeadOptions { placement, ..options(CLASSES, DIM as u32, ROWS as u64) };
                let device = device_of(run);
                let [mut one, mut other] = [(); 2].map(|()| Head::new(&device, &place.comm, &options));
                let what = format!("{placement:?} {run:?} rank {}", place.rank);
                let seen = step(&one, place, run, 1, None);
                seen.wait.and(seen.update).expect("a good step");
                // Rank 1 begins with the other head.
                let head = if place.rank == 1 { &mut other } else { &mut one };
                let seen = step(head, place, run, 3, None);
                let failure = seen.forward.and(seen.wait).expect_err(&what);
                assert_eq!(status_name(failure.status), "PFC_ERROR_MISMATCH", "{what}: {failure:?}");
                assert!(failure.message.contains("rank 1"), "{what}: {failure:?}");
                for refused in [head.wait(), head.prepare(&[1])] {
                    let failure = refused.expect_err(&what);
                    assert_eq!(status_name(failure.status), "PFC_ERROR_POISONED", "{what}: {failure:?}");
                }
            });
        }
    }
}

/// A rank that goes on to the next step where its peers go on with this one is no reason to wait, either.
#[test]
fn a_rank_that_leaves_a_step_its_peers_go_on_with_is_a_mismatch() {
    let _turn = emulator::turn(4);
    for placement in [Placement::Sharded, Placement::Replicated] {
        on_ranks(3, |place| {
            let options = HeadOptions { placement, ..options(CLASSES, DIM as u32, ROWS as u64) };
            let head = Head::new(&gpu(), &place.comm, &options);
            let what = format!("{placement:?} rank {}", place.rank);
            let mut rows = Array::new(Rows::f32(&[1.0; ROWS * DIM], DIM), true);
            let mut gradient = Array::new(Rows::output(ROWS, DIM), true);
            let (labels, loss) = (Remote::of(&[1i64, 2, 3]), Remote::of(&[0f64]));
            let (view, target) = (rows.view(), gradient.view());
            let (labels, late) = (labels.address as *const i64, loss.address as *mut f64);
            // SAFETY: a live head; arrays on the GPU of the sizes that the head takes, until after the last wait.
            let failure = unsafe {
                if place.rank == 1 {
                    let refused = outcome(c_head::pfc_head_forward(head.raw, null(), labels, late)).expect_err(&what);
                    assert_eq!(refused.status, Status::InvalidArgument as i32, "{what}: {refused:?}");
                    outcome(c_head::pfc_head_forward(head.raw, &view, labels, late)).expect_err(&what)
                } else {
                    outcome(c_head::pfc_head_forward(head.raw, &view, labels, late)).expect(&what);
                    let backward = outcome(c_head::pfc_head_backward(head.raw, 1.0, 1.0, &target));
                    backward.and_then(|()| outcome(c_head::pfc_head_update(head.raw, RATE))).expect_err(&what)
                }
            };
            assert_eq!(status_name(failure.status), "PFC_ERROR_MISMATCH", "{what}: {failure:?}");
            // SAFETY: as above.
            let refused = outcome(unsafe { c_head::pfc_head_wait(head.raw) }).expect_err(&what);
            assert_eq!(status_name(refused.status), "PFC_ERROR_POISONED", "{what}: {refused:?}");
            // Waits for what uses the arrays.
            drop(head);
        });
    }
}

/// The very first step: a rank that has no loss cannot know from an earlier one where its peers have theirs.
#[test]
fn a_rank_without_a_loss_in_the_first_step_is_heard_of_whatever_its_peers_have() {
    let _turn = emulator::turn(5);
    for placement in [Placement::Sharded, Placement::Replicated] {
        for (fault, number) in [(Fault::NoLoss, 1), (Fault::NoLoss, 3), (Fault::NoLossAfterPrepare, 5)] {
            for (run, failing) in [(Where::DeviceLoss, 0), (Where::DeviceLoss, 2), (Where::HostLoss, 1)] {
                on_ranks(3, |place| {
                    let options = HeadOptions { placement, ..options(CLASSES, DIM as u32, ROWS as u64) };
                    let mut head = Head::new(&gpu(), &place.comm, &options);
                    let what = format!("{run:?} {placement:?} {fault:?} of rank {failing}, rank {}", place.rank);
                    let seen = step(&head, place, run, number, Some((fault, failing)));
                    judge(&what, &seen, run, fault, failing, place.rank);
                    let seen = step(&head, place, run, number + 1, None);
                    for call in [seen.forward, seen.backward, seen.update, seen.wait] {
                        call.unwrap_or_else(|e| panic!("{what}, the step after it: {e:?}"));
                    }
                    assert_eq!(head.metrics().expect("metrics").updates, 1, "{what}");
                });
            }
        }
    }
}

/// A caller's samples may be larger than any draw; the ranks' dW are of one size all the same, wherever they add them up.
#[test]
fn large_samples_that_differ_on_the_ranks_are_a_mismatch_whatever_the_loss() {
    let _turn = emulator::turn(6);
    const MANY: u64 = 60;
    let ids = |count: i64| (0..count).collect::<Vec<i64>>();
    let labels = 3 * ROWS as i64;
    // None: drawn, 9 at most. Some are as large as that only with the positives.
    let cases = [
        [None, Some(ids(40)), None],
        [Some(ids(40)), Some(ids(30)), Some(ids(40))],
        [Some(ids(20)), Some(ids(20)), Some(ids(labels - 1))],
        [Some(vec![2]), Some(ids(MANY as i64)), None],
    ];
    for run in [Where::HostLoss, Where::DeviceLoss] {
        for samples in &cases {
            on_ranks(3, |place| {
                let placement = Placement::Replicated;
                let options = HeadOptions { placement, sample_rate: 0.0, ..options(MANY, DIM as u32, ROWS as u64) };
                let mut head = Head::new(&gpu(), &place.comm, &options);
                let before = bits(head.centers());
                let what = format!("{run:?} {samples:?} rank {}", place.rank);
                for number in [1, 3] {
                    if let Some(ids) = &samples[place.rank] {
                        head.set_sample(ids).expect("a sample by itself");
                    }
                    // Nobody's fault in particular: the first rank that differs from rank 0 is named.
                    let failing = if samples[1] == samples[0] { 2 } else { 1 };
                    let seen = step(&head, place, run, number, Some((Fault::AnotherSample, failing)));
                    judge(&what, &seen, run, Fault::AnotherSample, failing, place.rank);
                    assert!(before == bits(head.centers()), "{what}: rows have moved");
                }
                let seen = step(&head, place, run, 4, None);
                for call in [seen.forward, seen.backward, seen.update, seen.wait] {
                    call.unwrap_or_else(|e| panic!("{what}, the step after it: {e:?}"));
                }
                assert_eq!(head.metrics().expect("metrics").updates, 1, "{what}");
            });
        }
    }
}

#[test]
fn a_large_sample_gives_the_same_rows_whatever_the_loss() {
    let _turn = emulator::turn(7);
    const MANY: u64 = 60;
    let rows = [Where::HostLoss, Where::DeviceLoss].map(|run| {
        on_ranks(3, |place| {
            let placement = Placement::Replicated;
            let options = HeadOptions { placement, sample_rate: 0.0, ..options(MANY, DIM as u32, ROWS as u64) };
            let mut head = Head::new(&gpu(), &place.comm, &options);
            for number in 1..7 {
                if number > 2 {
                    head.set_sample(&(0..10 * (number as i64 - 1)).collect::<Vec<i64>>()).expect("a sample");
                }
                let seen = step(&head, place, run, number, None);
                for call in [seen.forward, seen.backward, seen.update, seen.wait] {
                    call.unwrap_or_else(|e| panic!("{run:?}: {e:?}"));
                }
            }
            bits(head.centers())
        })
    });
    assert_eq!(rows[0], rows[1]);
    assert!(rows[0].iter().all(|of_rank| of_rank == &rows[0][0]), "the ranks' rows differ");
}
