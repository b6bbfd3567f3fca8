//! A device that is not there, for what waits on streams and events: its memory is the host's, and its streams are queues that
//! run late, in a seeded order that respects only events. A wait that somebody forgot shows as wrong numbers.

use std::any::Any;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use partialfc::matrix::{DType, ReduceOp};
use partialfc::stream::{self, Event, StreamMemory, MOST_REDUCED};
use partialfc::{Error, Result, Status};

/// Numbers that a reduction takes; all values of the tests are whole and small.
pub trait Cell: Copy + Send + Sync + 'static {
    const DTYPE: DType;
    fn of(value: i64) -> Self;
    fn whole(self) -> i64;
}

macro_rules! cells {
    ($($t:ty => $dtype:ident),*) => { $(impl Cell for $t {
        const DTYPE: DType = DType::$dtype;
        fn of(value: i64) -> $t {
            value as $t
        }
        fn whole(self) -> i64 {
            self as i64
        }
    })* };
}
cells!(f32 => F32, f64 => F64, i32 => I32, i64 => I64);

/// A stream of numbers that a seed fixes (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

/// How the streams run when somebody waits for one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The one that is waited for runs as far as it can before any other.
    Awaited,
    /// All others run as far as they can first.
    Others,
    Any,
}

/// An event: whether its stream has come to it.
struct FakeEvent(AtomicBool);

impl stream::StreamEvent for FakeEvent {
    fn is_over(&self) -> Result<bool> {
        Ok(self.0.load(Ordering::SeqCst))
    }
}

enum Task {
    Work(Box<dyn FnOnce() + Send>),
    Record(Arc<FakeEvent>),
    Wait(Arc<FakeEvent>),
}

struct State {
    streams: Vec<VecDeque<Task>>,
    random: Random,
    events: Vec<Weak<FakeEvent>>,
    memory: Vec<Range<usize>>,
}

/// The device: its streams, and how they run.
pub struct World {
    state: Mutex<State>,
    order: Order,
    /// Whether some work runs as soon as other work comes onto a stream.
    eager: bool,
    ran: AtomicUsize,
    host_waits: AtomicUsize,
}

impl World {
    /// A device with `streams` streams, numbered from 0.
    pub fn new(streams: usize, seed: u64, order: Order, eager: bool) -> Arc<World> {
        let state = State {
            streams: (0..streams).map(|_| VecDeque::new()).collect(),
            random: Random(seed),
            events: Vec::new(),
            memory: Vec::new(),
        };
        let (ran, host_waits) = Default::default();
        Arc::new(World { state: Mutex::new(state), order, eager, ran, host_waits })
    }

    pub fn stream(index: usize) -> *mut c_void {
        std::ptr::without_provenance_mut(index + 1)
    }

    /// Memory of the device, the values of `cells` for a start. It lives as long as the process.
    pub fn allocate<T: Cell>(&self, cells: Vec<T>) -> *mut T {
        let cells = cells.leak();
        let range = cells.as_ptr_range();
        self.lock().memory.push(range.start as usize..range.end as usize);
        cells.as_mut_ptr()
    }

    pub fn owns(&self, address: *const u8) -> bool {
        self.lock().memory.iter().any(|range| range.contains(&(address as usize)))
    }

    /// Puts work onto a stream.
    pub fn enqueue(&self, stream: *mut c_void, work: impl FnOnce() + Send + 'static) {
        self.push(stream, Task::Work(Box::new(work)));
    }

    /// Runs all that is on a stream, and what that waits for.
    pub fn finish(&self, stream: *mut c_void) {
        let mut state = self.lock();
        let awaited = stream as usize - 1;
        while !state.streams[awaited].is_empty() {
            self.run_one(&mut state, Some(awaited));
        }
    }

    /// Pieces of work that have run.
    pub fn ran(&self) -> usize {
        self.ran.load(Ordering::SeqCst)
    }

    /// How often the host waited for the device.
    pub fn host_waits(&self) -> usize {
        self.host_waits.load(Ordering::SeqCst)
    }

    /// Events that somebody still holds, the streams apart if all have run.
    pub fn events(&self) -> usize {
        self.lock().events.iter().filter(|event| event.strong_count() > 0).count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn push(&self, stream: *mut c_void, task: Task) {
        let mut state = self.lock();
        state.streams[stream as usize - 1].push_back(task);
        if self.eager {
            for _ in 0..state.random.below(4) {
                self.run_one(&mut state, None);
            }
        }
    }

    /// Runs the first task of a stream that can run.
    fn run_one(&self, state: &mut State, awaited: Option<usize>) {
        let can_run = |queue: &VecDeque<Task>| match queue.front() {
            Some(Task::Wait(event)) => event.0.load(Ordering::SeqCst),
            front => front.is_some(),
        };
        let mut able: Vec<usize> = (0..state.streams.len()).filter(|&i| can_run(&state.streams[i])).collect();
        if let Some(awaited) = awaited {
            assert!(!able.is_empty(), "stream {awaited} waits for an event that nothing on any stream brings about");
            match self.order {
                Order::Awaited if able.contains(&awaited) => able = vec![awaited],
                Order::Others if able.len() > 1 => able.retain(|&i| i != awaited),
                _ => (),
            }
        }
        if able.is_empty() {
            return;
        }
        let chosen = able[state.random.below(able.len())];
        match state.streams[chosen].pop_front() {
            Some(Task::Work(work)) => {
                work();
                self.ran.fetch_add(1, Ordering::SeqCst);
            }
            Some(Task::Record(event)) => event.0.store(true, Ordering::SeqCst),
            _ => (),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Record,
    Wait,
    Copy,
    Reduce,
    ToHost,
    ToDevice,
    Synchronize,
}

/// What goes wrong with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Fails,
    Panics,
    /// Nothing is done, and nobody hears of it.
    Forgets,
}

/// Which call of a method goes wrong, by its number from 0.
pub type Which = Box<dyn Fn(usize) -> bool + Send + Sync>;

/// One rank's view of the device's memory.
pub struct FakeMemory {
    pub world: Arc<World>,
    kind: &'static str,
    calls: [AtomicUsize; 7],
    plan: Option<(Method, Fault, Which)>,
}

pub const PLANTED: &str = "the driver returned a planted error";

impl FakeMemory {
    pub fn new(world: &Arc<World>) -> FakeMemory {
        FakeMemory { world: world.clone(), kind: "fake", calls: Default::default(), plan: None }
    }

    pub fn of_kind(world: &Arc<World>, kind: &'static str) -> FakeMemory {
        FakeMemory { kind, ..FakeMemory::new(world) }
    }

    pub fn with_fault(world: &Arc<World>, method: Method, fault: Fault, which: Which) -> FakeMemory {
        FakeMemory { plan: Some((method, fault, which)), ..FakeMemory::new(world) }
    }

    /// Whether the call is to be done.
    fn enter(&self, method: Method) -> Result<bool> {
        let number = self.calls[method as usize].fetch_add(1, Ordering::SeqCst);
        match &self.plan {
            Some((planned, fault, which)) if *planned == method && which(number) => match fault {
                Fault::Fails => Err(Error::new(Status::Device, PLANTED)),
                Fault::Panics => panic!("{PLANTED}"),
                Fault::Forgets => Ok(false),
            },
            _ => Ok(true),
        }
    }
}

fn addresses<T>(pointers: &[*const T]) -> Vec<usize> {
    pointers.iter().map(|&pointer| pointer as usize).collect()
}

/// Element by element, as a kernel's threads would: all sources are read before any destination is written.
fn combine<T: Cell>(sources: &[usize], destinations: &[usize], range: Range<usize>, op: ReduceOp) {
    for i in range {
        let values = sources.iter().map(|&source| unsafe { (source as *const T).add(i).read() }.whole());
        let result = match op {
            ReduceOp::Sum => values.sum(),
            ReduceOp::Max => values.max().unwrap(),
        };
        destinations.iter().for_each(|&destination| unsafe { (destination as *mut T).add(i).write(T::of(result)) });
    }
}

impl StreamMemory for FakeMemory {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn record(&self, stream: *mut c_void) -> Result<Event> {
        let event = Arc::new(FakeEvent(AtomicBool::new(false)));
        if self.enter(Method::Record)? {
            self.world.lock().events.push(Arc::downgrade(&event));
            self.world.push(stream, Task::Record(event.clone()));
        }
        Ok(event)
    }

    fn wait(&self, stream: *mut c_void, event: &Event) -> Result<()> {
        if self.enter(Method::Wait)? {
            let event: Arc<dyn Any + Send + Sync> = event.clone();
            let event = event.downcast::<FakeEvent>().expect("an event of this kind of memory");
            self.world.push(stream, Task::Wait(event));
        }
        Ok(())
    }

    unsafe fn copy(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        assert!(bytes > 0 && (destination as usize).abs_diff(source as usize) >= bytes);
        let (destination, source) = (destination as usize, source as usize);
        if self.enter(Method::Copy)? {
            self.world.enqueue(stream, move || (source as *const u8).copy_to_nonoverlapping(destination as *mut u8, bytes));
        }
        Ok(())
    }

    unsafe fn reduce(
        &self,
        sources: &[*const u8],
        destinations: &[*mut u8],
        first: usize,
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: *mut c_void,
    ) -> Result<()> {
        assert!(count > 0 && sources.len() <= MOST_REDUCED && [1, sources.len()].contains(&destinations.len()));
        let destinations: Vec<*const u8> = destinations.iter().map(|destination| destination.cast_const()).collect();
        let (from, to, range) = (addresses(sources), addresses(&destinations), first..first + count);
        let work: Box<dyn FnOnce() + Send> = match dtype {
            DType::F32 => Box::new(move || combine::<f32>(&from, &to, range, op)),
            DType::F64 => Box::new(move || combine::<f64>(&from, &to, range, op)),
            DType::I32 => Box::new(move || combine::<i32>(&from, &to, range, op)),
            DType::I64 => Box::new(move || combine::<i64>(&from, &to, range, op)),
            _ => panic!("no reduction of {}", dtype.name()),
        };
        if self.enter(Method::Reduce)? {
            self.world.push(stream, Task::Work(work));
        }
        Ok(())
    }

    unsafe fn to_host(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        assert!(bytes > 0 && self.world.owns(source) && !self.world.owns(destination));
        if self.enter(Method::ToHost)? {
            self.world.host_waits.fetch_add(1, Ordering::SeqCst);
            self.world.finish(stream);
            source.copy_to_nonoverlapping(destination, bytes);
        }
        Ok(())
    }

    unsafe fn to_device(&self, destination: *mut u8, source: *const u8, bytes: usize, stream: *mut c_void) -> Result<()> {
        assert!(bytes > 0 && self.world.owns(destination) && !self.world.owns(source));
        if self.enter(Method::ToDevice)? {
            // From a copy, later: the host need not wait for the stream.
            let (copy, to) = (std::slice::from_raw_parts(source, bytes).to_vec(), destination as usize);
            self.world.enqueue(stream, move || copy.as_ptr().copy_to_nonoverlapping(to as *mut u8, copy.len()));
        }
        Ok(())
    }

    fn synchronize(&self, stream: *mut c_void) -> Result<()> {
        if self.enter(Method::Synchronize)? {
            self.world.host_waits.fetch_add(1, Ordering::SeqCst);
            self.world.finish(stream);
        }
        Ok(())
    }
}
