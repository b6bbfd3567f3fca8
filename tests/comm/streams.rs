//! Collectives in a device's memory: every transport against a model, on streams that run late, and what a failing driver does on
//! every rank.

use std::ffi::c_void;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::{Duration, Instant};

use partialfc::comm::{Communicator, MemorySpace};
use partialfc::matrix::ReduceOp;
use partialfc::stream::StreamMemory;
use partialfc::{Error, Result, Status};
use partialfc_testing::ranks::LONG;

use crate::fake_device::*;
use crate::tables::{table, DEVICE_MEMORY, HOST_MEMORY, STREAM_ORDERED};

/// What carries a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Alone,
    Threads,
    /// A table of functions with these flags, with or without its optional slots.
    Table(u32, bool),
}

/// Elements of a rank's buffers: enough that four ranks share a reduction.
const CELLS: usize = 100;

#[derive(Clone, Copy, Debug)]
enum Step {
    Gather(usize, bool),
    Reduce(usize, ReduceOp, bool),
    Scatter(usize, ReduceOp, bool),
    Broadcast(usize, usize),
    Barrier,
}

fn program(random: &mut Random, size: usize) -> Vec<Step> {
    let steps = 1 + random.below(8);
    (0..steps)
        .map(|_| {
            let op = [ReduceOp::Sum, ReduceOp::Max][random.below(2)];
            let in_place = random.below(2) == 0;
            match random.below(9) {
                0 | 1 => Step::Gather(random.below(CELLS / size + 1), in_place),
                2..=4 => Step::Reduce(random.below(CELLS + 1), op, in_place),
                5 | 6 => Step::Scatter(random.below(CELLS / size + 1), op, in_place),
                7 => Step::Broadcast(random.below(CELLS + 1), random.below(size)),
                _ => Step::Barrier,
            }
        })
        .collect()
}

/// One rank's two buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cells {
    a: Vec<i64>,
    b: Vec<i64>,
}

fn start(rank: usize, i: usize) -> (i64, i64) {
    (((rank * 13 + i * 7) % 31) as i64, -((i + rank) as i64 % 5))
}

/// What a rank does to its cells between operations: late peers would read or overwrite the wrong ones.
fn mix(rank: usize, i: usize, a: i64, b: i64) -> (i64, i64) {
    let a = (3 * a + b + (i + rank) as i64).rem_euclid(31);
    (a, a - 7)
}

/// What the steps leave on all ranks.
fn model(size: usize, steps: &[Step]) -> Vec<Cells> {
    let fresh = |rank| {
        let (a, b) = (0..CELLS).map(|i| start(rank, i)).unzip();
        Cells { a, b }
    };
    let mut ranks: Vec<Cells> = (0..size).map(fresh).collect();
    for &step in steps {
        let before = ranks.clone();
        let combine = |i: usize, op| {
            let values = before.iter().map(|cells| cells.a[i]);
            match op {
                ReduceOp::Sum => values.sum(),
                ReduceOp::Max => values.max().unwrap(),
            }
        };
        for (rank, cells) in ranks.iter_mut().enumerate() {
            match step {
                Step::Gather(n, false) => (0..n * size).for_each(|i| cells.b[i] = before[i / n].a[i % n]),
                Step::Gather(n, true) => (0..n * size).for_each(|i| cells.b[i] = before[i / n].b[i]),
                Step::Reduce(n, op, false) => (0..n).for_each(|i| cells.b[i] = combine(i, op)),
                Step::Reduce(n, op, true) => (0..n).for_each(|i| cells.a[i] = combine(i, op)),
                Step::Scatter(n, op, false) => (0..n).for_each(|i| cells.b[i] = combine(rank * n + i, op)),
                Step::Scatter(n, op, true) => (rank * n..(rank + 1) * n).for_each(|i| cells.a[i] = combine(i, op)),
                Step::Broadcast(n, root) => cells.a[..n].copy_from_slice(&before[root].a[..n]),
                Step::Barrier => (),
            }
            for i in 0..CELLS {
                (cells.a[i], cells.b[i]) = mix(rank, i, cells.a[i], cells.b[i]);
            }
        }
    }
    ranks
}

/// One rank with its memory, its stream and its buffers on the device.
struct Rank {
    comm: Arc<Communicator>,
    memory: Arc<FakeMemory>,
    stream: usize,
    a: usize,
    b: usize,
}

impl Rank {
    fn new<T: Cell>(comm: Arc<Communicator>, memory: Arc<FakeMemory>) -> Rank {
        comm.set_timeout(LONG).unwrap();
        let stream = World::stream(comm.rank() as usize);
        let [a, b] = [(); 2].map(|_| memory.world.allocate(vec![T::of(-1000); CELLS]) as usize);
        Rank { comm, memory, stream: stream as usize, a, b }
    }

    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    fn number(&self) -> usize {
        self.comm.rank() as usize
    }

    fn place(&self) -> MemorySpace<'_> {
        MemorySpace::Device { memory: &*self.memory, stream: self.stream() }
    }

    fn map<T: Cell>(&self, change: impl Fn(usize, i64, i64) -> (i64, i64) + Send + 'static) {
        let (a, b) = (self.a, self.b);
        self.memory.world.enqueue(self.stream(), move || unsafe {
            for i in 0..CELLS {
                let (a, b) = ((a as *mut T).add(i), (b as *mut T).add(i));
                let (to_a, to_b) = change(i, a.read().whole(), b.read().whole());
                a.write(T::of(to_a));
                b.write(T::of(to_b));
            }
        });
    }

    fn perform<T: Cell>(&self, step: Step) -> Result<()> {
        let (comm, rank, place) = (&self.comm, self.number(), self.place());
        let (a, b) = (self.a as *mut T, self.b as *mut T);
        let size = std::mem::size_of::<T>();
        unsafe {
            match step {
                Step::Gather(n, false) => comm.all_gather_raw(a.cast(), b.cast(), n * size, place),
                Step::Gather(n, true) => comm.all_gather_raw(b.add(rank * n).cast(), b.cast(), n * size, place),
                Step::Reduce(n, op, false) => comm.all_reduce_raw(a.cast(), b.cast(), n, T::DTYPE, op, place),
                Step::Reduce(n, op, true) => comm.all_reduce_raw(a.cast(), a.cast(), n, T::DTYPE, op, place),
                Step::Scatter(n, op, false) => comm.reduce_scatter_raw(a.cast(), b.cast(), n, T::DTYPE, op, place),
                Step::Scatter(n, op, true) => comm.reduce_scatter_raw(a.cast(), a.add(rank * n).cast(), n, T::DTYPE, op, place),
                Step::Broadcast(n, root) => comm.broadcast_raw(a.cast(), n * size, root as u32, place),
                Step::Barrier => comm.barrier(),
            }
        }
    }

    /// The buffers, when all that is on the stream has run.
    fn cells<T: Cell>(&self) -> Cells {
        self.memory.world.finish(self.stream());
        let read = |data: usize| (0..CELLS).map(|i| unsafe { (data as *const T).add(i).read() }.whole()).collect();
        Cells { a: read(self.a), b: read(self.b) }
    }
}

/// Runs `body` on each rank's own thread and gives what they returned, in rank order.
fn together<T: Send>(ranks: &[Rank], body: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ranks.iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A group of as many ranks as there are memories.
fn group<T: Cell>(transport: Transport, memories: Vec<FakeMemory>) -> Vec<Rank> {
    let memories: Vec<Arc<FakeMemory>> = memories.into_iter().map(Arc::new).collect();
    let comms = match transport {
        Transport::Alone => vec![Communicator::single().unwrap()],
        Transport::Threads => Communicator::threads(memories.len() as u32).unwrap(),
        Transport::Table(flags, full) => {
            let inner = Communicator::threads(memories.len() as u32).unwrap();
            inner.into_iter().zip(&memories).map(|(comm, memory)| table(comm, memory.clone(), flags, full)).collect()
        }
    };
    comms.into_iter().zip(memories).map(|(comm, memory)| Rank::new::<T>(comm, memory)).collect()
}

/// Runs a seeded program; says where the result differs from the model's.
fn exercise<T: Cell>(
    transport: Transport,
    size: usize,
    seed: u64,
    memory: impl Fn(&Arc<World>) -> FakeMemory,
) -> std::result::Result<(), String> {
    let mut random = Random(seed);
    let order = [Order::Awaited, Order::Others, Order::Any][random.below(3)];
    let (eager, wait_alone) = (random.below(3) == 0, random.below(2) == 0);
    let world = World::new(size, seed, order, eager);
    let steps = program(&mut random, size);
    let told = |what: String| format!("{transport:?}, {size} ranks of {}, seed {seed}, {steps:?}: {what}", T::DTYPE.name());
    let ranks = group::<T>(transport, (0..size).map(|_| memory(&world)).collect());
    let outcomes = together(&ranks, |rank| -> Result<()> {
        let number = rank.number();
        rank.map::<T>(move |i, _, _| start(number, i));
        for &step in &steps {
            rank.perform::<T>(step)?;
            rank.map::<T>(move |i, a, b| mix(number, i, a, b));
        }
        if wait_alone {
            // While the others may still be putting their part onto their streams.
            world.finish(rank.stream());
        }
        Ok(())
    });
    if let Some(error) = outcomes.into_iter().find_map(|outcome| outcome.err()) {
        return Err(told(error.to_string()));
    }
    let ordered = match transport {
        Transport::Table(flags, full) => flags & STREAM_ORDERED != 0 && full,
        _ => true,
    };
    if ordered && world.host_waits() > 0 {
        return Err(told(format!("the host waited {} times", world.host_waits())));
    }
    if ordered && !eager && !wait_alone && world.ran() > 0 {
        return Err(told(format!("{} pieces of work ran before anybody waited", world.ran())));
    }
    let expected = model(size, &steps);
    let results: Vec<Cells> = ranks.iter().map(Rank::cells::<T>).collect();
    match expected == results {
        true => Ok(()),
        false => Err(told("wrong numbers".to_owned())),
    }?;
    if matches!(transport, Transport::Table(..)) {
        // Their watchdogs have the events of what they saw last.
        drop(ranks);
    }
    match world.events() {
        0 => Ok(()),
        events => Err(told(format!("{events} events outlive their operations"))),
    }
}

fn exercise_all(transport: Transport, sizes: std::ops::RangeInclusive<usize>, seeds: u64) {
    for size in sizes {
        for seed in 0..seeds {
            let outcome = match seed % 4 {
                0 => exercise::<f32>(transport, size, seed, FakeMemory::new),
                1 => exercise::<f64>(transport, size, seed, FakeMemory::new),
                2 => exercise::<i32>(transport, size, seed, FakeMemory::new),
                _ => exercise::<i64>(transport, size, seed, FakeMemory::new),
            };
            outcome.unwrap_or_else(|text| panic!("{text}"));
        }
    }
}

#[test]
fn one_rank_copies_on_its_stream() {
    exercise_all(Transport::Alone, 1..=1, 200);
}

#[test]
fn threads_work_on_each_other_s_streams() {
    exercise_all(Transport::Threads, 1..=5, 400);
}

#[test]
fn tables_for_host_memory_get_copies() {
    exercise_all(Transport::Table(HOST_MEMORY, true), 1..=4, 100);
    exercise_all(Transport::Table(HOST_MEMORY, false), 1..=4, 100);
}

#[test]
fn tables_for_device_memory_find_the_stream_at_rest() {
    exercise_all(Transport::Table(HOST_MEMORY | DEVICE_MEMORY, true), 1..=4, 100);
    exercise_all(Transport::Table(HOST_MEMORY | DEVICE_MEMORY, false), 1..=4, 100);
}

#[test]
fn tables_ordered_by_streams_get_the_stream() {
    exercise_all(Transport::Table(HOST_MEMORY | DEVICE_MEMORY | STREAM_ORDERED, true), 1..=4, 200);
    exercise_all(Transport::Table(HOST_MEMORY | DEVICE_MEMORY | STREAM_ORDERED, false), 1..=4, 100);
}

/// The tester tested: each kind of wait, left out, must show as wrong numbers.
#[test]
fn a_forgotten_wait_shows() {
    const SIZE: usize = 3;
    type Kind = fn(usize) -> bool;
    // An operation waits for each peer's event before its work, then for each peer's after it.
    let kinds: [(&str, Kind); 4] = [
        ("before", |number| number % (2 * (SIZE - 1)) < SIZE - 1),
        ("after", |number| number % (2 * (SIZE - 1)) >= SIZE - 1),
        ("the second peer's before", |number| number % (2 * (SIZE - 1)) == 1),
        ("the second peer's after", |number| number % (2 * (SIZE - 1)) == 3),
    ];
    for (name, kind) in kinds {
        let forgetful = |world: &Arc<World>| FakeMemory::with_fault(world, Method::Wait, Fault::Forgets, Box::new(kind));
        let seen = (0..200).filter(|&seed| exercise::<f32>(Transport::Threads, SIZE, seed, forgetful).is_err()).count();
        assert!(seen >= 20, "{name}: seen by {seen} seeds of 200");
    }
}

/// Every call of the driver that a rank makes in an operation, failing or panicking.
#[test]
fn a_failing_driver_fails_the_operation_on_all_ranks() {
    const FAILING: usize = 1;
    let gather = Step::Gather(8, false);
    let reduce = Step::Reduce(CELLS, ReduceOp::Sum, true);
    let scatter = Step::Scatter(8, ReduceOp::Max, false);
    let broadcast = Step::Broadcast(CELLS, 0);
    // Operations of three ranks: record, wait for two, work, record, wait for two.
    let cases = [
        (gather, Method::Record, 0, true),
        (gather, Method::Record, 1, true),
        (gather, Method::Wait, 0, true),
        (reduce, Method::Wait, 1, true),
        (gather, Method::Copy, 0, true),
        (gather, Method::Copy, 2, true),
        (reduce, Method::Reduce, 0, true),
        (scatter, Method::Reduce, 0, true),
        (broadcast, Method::Copy, 0, true),
        // The peers have no part in this one: they hear of it in the next operation.
        (reduce, Method::Wait, 2, false),
    ];
    std::panic::set_hook(Box::new(|info| {
        if !info.to_string().contains(PLANTED) {
            eprintln!("{info}");
        }
    }));
    let begin = Instant::now();
    for (step, method, number, shared) in cases {
        for fault in [Fault::Fails, Fault::Panics] {
            let case = format!("{step:?}, {fault:?} in {method:?} {number}");
            let world = World::new(3, 1, Order::Any, false);
            let memory = |rank: usize| match rank == FAILING {
                true => FakeMemory::with_fault(&world, method, fault, Box::new(move |n| n == number)),
                false => FakeMemory::new(&world),
            };
            let ranks = group::<f32>(Transport::Threads, (0..3).map(memory).collect());
            let outcomes = together(&ranks, |rank| {
                let outcome = catch_unwind(AssertUnwindSafe(|| rank.perform::<f32>(step)));
                if outcome.is_err() {
                    // As the C interface does.
                    rank.comm.abort(&Error::new(Status::Panic, PLANTED));
                }
                outcome
            });
            for (rank, outcome) in outcomes.into_iter().enumerate() {
                match (rank == FAILING, fault, outcome) {
                    (true, Fault::Fails, Ok(Err(error))) => {
                        assert_eq!(error.status, Status::Device, "{case}: {error}");
                        assert!(error.message.contains(PLANTED) && error.message.contains(" #1: "), "{case}: {error}");
                    }
                    (true, Fault::Panics, Err(_)) => (),
                    (false, _, Ok(Err(error))) if shared => {
                        assert_eq!(error.status, Status::Aborted, "{case}: {error}");
                        assert!(error.message.contains("rank 1"), "{case}: {error}");
                        let cause = if fault == Fault::Fails { "DEVICE" } else { "PANIC" };
                        assert!(error.message.contains(cause), "{case}: {error}");
                    }
                    (false, _, Ok(Ok(()))) if !shared => (),
                    (_, _, other) => panic!("{case}: rank {rank} got {other:?}"),
                }
            }
            // Whatever had come onto the streams can run, and no operation follows.
            ranks.iter().for_each(|rank| world.finish(rank.stream()));
            let later = together(&ranks, |rank| rank.perform::<f32>(reduce));
            later.iter().for_each(|outcome| assert_eq!(outcome.as_ref().unwrap_err().status, Status::Aborted, "{case}"));
            ranks.iter().for_each(|rank| world.finish(rank.stream()));
            assert_eq!(world.events(), 0, "{case}");
        }
    }
    let _ = std::panic::take_hook();
    assert!(begin.elapsed() < LONG / 2);
}

/// What a failed rank had on its stream, the others wait for all the same: the buffers may be freed in the streams' order.
#[test]
fn work_before_a_failure_is_still_waited_for() {
    for order in [Order::Awaited, Order::Others] {
        let world = World::new(2, 3, order, false);
        // The second of rank 1's two copies fails; the first reads from rank 0's buffer.
        let failing = FakeMemory::with_fault(&world, Method::Copy, Fault::Fails, Box::new(|number| number == 1));
        let ranks = group::<i32>(Transport::Threads, vec![FakeMemory::new(&world), failing]);
        ranks.iter().for_each(|rank| rank.map::<i32>(|i, _, _| (i as i64, 0)));
        let outcomes = together(&ranks, |rank| {
            let outcome = rank.perform::<i32>(Step::Gather(4, false));
            rank.map::<i32>(|_, _, b| (-1, b));
            outcome
        });
        assert!(outcomes.iter().all(|outcome| outcome.is_err()));
        assert_eq!(ranks[0].cells::<i32>().a[0], -1);
        assert_eq!(ranks[1].cells::<i32>().b[..4], [0, 1, 2, 3], "{order:?}");
    }
}

#[test]
fn ranks_that_do_not_come_or_abort_are_told_as_in_host_memory() {
    let world = World::new(3, 0, Order::Any, false);
    let memories = |_| (0..3).map(|_| FakeMemory::new(&world)).collect();
    let step = Step::Reduce(CELLS, ReduceOp::Sum, true);
    let ranks = group::<f32>(Transport::Threads, memories(()));
    ranks[0].comm.set_timeout(Duration::from_millis(50)).unwrap();
    let outcomes = together(&ranks[..2], |rank| {
        // The time of rank 0 begins when rank 1 is on its way; on a busy machine it may get no further.
        while rank.number() == 0 && ranks[1].comm.traffic().calls[1] == 0 {
            std::thread::yield_now();
        }
        rank.perform::<f32>(step)
    });
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let error = outcome.unwrap_err();
        let end = format!("2 did not arrive within 50 ms (this is rank {rank})");
        assert_eq!(error.status, Status::Timeout);
        assert!(error.message.starts_with("all_reduce #1: rank") && error.message.ends_with(&end), "{error}");
    }
    assert_eq!(ranks[2].perform::<f32>(step).unwrap_err().status, Status::Timeout);

    let begin = Instant::now();
    let ranks = group::<f32>(Transport::Threads, memories(()));
    std::thread::scope(|scope| {
        let ranks = &ranks;
        let waiting = [0, 1].map(|rank: usize| scope.spawn(move || ranks[rank].perform::<f32>(step)));
        while ranks[..2].iter().any(|rank| rank.comm.traffic().calls[1] == 0) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(2));
        ranks[2].comm.abort(&Error::new(Status::Aborted, "enough"));
        for thread in waiting {
            let error = thread.join().unwrap().unwrap_err();
            assert_eq!(error.status, Status::Aborted);
            assert!(error.message.contains("rank 2 aborted the communicator: enough"), "{error}");
        }
    });
    assert!(begin.elapsed() < LONG / 2);
    (0..3).for_each(|stream| world.finish(World::stream(stream)));
    assert_eq!(world.events(), 0);
}

/// A function that has returned may have left on the stream what never ends: its stream is never run.
#[test]
fn what_stays_on_a_stream_beyond_its_deadline_is_stopped() {
    const FLAGS: u32 = HOST_MEMORY | DEVICE_MEMORY | STREAM_ORDERED;
    let begin = Instant::now();
    let world = World::new(2, 0, Order::Any, false);
    let ranks = group::<f32>(Transport::Table(FLAGS, true), (0..2).map(|_| FakeMemory::new(&world)).collect());
    // Done in time, it is forgotten.
    assert_eq!(together(&ranks, |rank| rank.perform::<f32>(Step::Gather(3, false))), vec![Ok(()); 2]);
    ranks.iter().for_each(|rank| world.finish(rank.stream()));
    // The functions must return in that time, on a busy machine too; only the stream's work must not end.
    ranks[0].comm.set_timeout(Duration::from_millis(3000)).unwrap();
    assert_eq!(together(&ranks, |rank| rank.perform::<f32>(Step::Reduce(CELLS, ReduceOp::Sum, true))), vec![Ok(()); 2]);
    let stopped = loop {
        match ranks[0].comm.poll_failure() {
            Ok(()) if begin.elapsed() < LONG => std::thread::yield_now(),
            outcome => break outcome.unwrap_err(),
        }
    };
    let text = "all_reduce #2 did not finish on its stream within 3000 ms (this is rank 0)";
    assert_eq!(stopped, Error::new(Status::Timeout, text));
    assert_eq!(ranks[0].comm.failure(), Some(stopped.clone()));
    assert_eq!(ranks[0].comm.poll_failure(), Err(stopped));
    // Its abort was called: the other rank's function hears of it.
    assert_eq!(ranks[1].comm.poll_failure(), Ok(()));
    let outcomes = together(&ranks, |rank| rank.perform::<f32>(Step::Gather(3, false)).unwrap_err().status);
    assert_eq!(outcomes, [Status::Aborted, Status::Comm]);
}

#[test]
fn ranks_in_different_memories_are_told() {
    let world = World::new(2, 0, Order::Any, false);
    let step = Step::Reduce(CELLS, ReduceOp::Sum, false);
    let ranks = group::<f32>(Transport::Threads, vec![FakeMemory::new(&world), FakeMemory::of_kind(&world, "other")]);
    for outcome in together(&ranks, |rank| rank.perform::<f32>(step)) {
        let error = outcome.unwrap_err();
        assert_eq!(error.status, Status::Mismatch);
        assert!(error.message.contains("memory is fake on rank 0 and other on rank 1"), "{error}");
    }
    let ranks = group::<f32>(Transport::Threads, vec![FakeMemory::new(&world), FakeMemory::new(&world)]);
    let outcomes = together(&ranks, |rank| match rank.number() {
        0 => rank.comm.all_reduce(&mut [0f32; CELLS], ReduceOp::Sum),
        _ => rank.perform::<f32>(step),
    });
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert_eq!(error.status, Status::Mismatch);
        assert!(error.message.contains("memory is host on rank 0 and fake on rank 1"), "{error}");
    }
}

#[test]
fn more_ranks_than_a_reduction_takes_are_refused() {
    for (size, status) in [(16, None), (17, Some(Status::Unsupported))] {
        let world = World::new(size, 0, Order::Any, false);
        let ranks = group::<f32>(Transport::Threads, (0..size).map(|_| FakeMemory::new(&world)).collect());
        let outcomes = together(&ranks, |rank| rank.perform::<f32>(Step::Reduce(CELLS, ReduceOp::Sum, true)));
        outcomes.into_iter().for_each(|outcome| assert_eq!(outcome.err().map(|error| error.status), status, "{size} ranks"));
    }
}

/// A rank whose copies to or from the host fail tells the others by its table's abort.
#[test]
fn a_failing_copy_of_a_table_s_rank_ends_the_group() {
    let staged = Transport::Table(HOST_MEMORY, true);
    let direct = Transport::Table(HOST_MEMORY | DEVICE_MEMORY, true);
    let cases = [(staged, Method::ToHost, false), (staged, Method::ToDevice, true), (direct, Method::Synchronize, false)];
    let begin = Instant::now();
    for (transport, method, after) in cases {
        for step in [Step::Gather(4, false), Step::Reduce(9, ReduceOp::Max, true), Step::Scatter(3, ReduceOp::Sum, false)] {
            let world = World::new(2, 0, Order::Any, false);
            let failing = FakeMemory::with_fault(&world, method, Fault::Fails, Box::new(|number| number == 0));
            let ranks = group::<i64>(transport, vec![FakeMemory::new(&world), failing]);
            let outcomes = together(&ranks, |rank| rank.perform::<i64>(step));
            let error = outcomes[1].clone().unwrap_err();
            assert_eq!(error.status, Status::Device);
            assert!(error.message.contains(PLANTED) && error.message.contains(" #1: "), "{error}");
            match after {
                true => assert_eq!(outcomes[0], Ok(())),
                false => assert_eq!(outcomes[0].clone().unwrap_err().status, Status::Comm),
            }
            assert!(together(&ranks, |rank| rank.perform::<i64>(step)).iter().all(|outcome| outcome.is_err()));
        }
    }
    assert!(begin.elapsed() < LONG / 2);
}

/// The head's messages before a device is known travel in host memory, between those in a device's.
#[test]
fn host_and_device_memory_take_turns() {
    for transport in [Transport::Threads, Transport::Table(HOST_MEMORY | DEVICE_MEMORY | STREAM_ORDERED, true)] {
        let world = World::new(3, 5, Order::Others, true);
        let ranks = group::<i64>(transport, (0..3).map(|_| FakeMemory::new(&world)).collect());
        together(&ranks, |rank| {
            let number = rank.number();
            rank.map::<i64>(move |_, _, _| (number as i64, 0));
            for round in 0..200 {
                rank.perform::<i64>(Step::Reduce(CELLS, ReduceOp::Max, true)).unwrap();
                rank.map::<i64>(move |_, a, _| (a + number as i64, 0));
                let mut counts = [round, number as i64];
                rank.comm.all_reduce(&mut counts, ReduceOp::Sum).unwrap();
                assert_eq!(counts, [3 * round, 3]);
            }
            assert_eq!(rank.memory.kind(), "fake");
        });
        for rank in &ranks {
            // 2, then 2 more a round on the last rank, which all get in the next.
            assert_eq!(rank.cells::<i64>().a, [2 + 2 * 199 + rank.number() as i64; CELLS]);
        }
    }
}
