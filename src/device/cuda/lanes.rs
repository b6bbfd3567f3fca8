//! A head's streams, and what orders them.
//!
//! The caller's stream has the step from the embeddings to their gradient. Beside it run the draw of the next step; the class
//! centres' own work (their gradient, the update, the gather for a step that is prepared); and, with several ranks, the collectives.
//! Work on one lane comes after work on another only where `join` says so.

use std::cell::RefCell;
use std::sync::Arc;

use super::driver::{Context, Event, Priority, Stream};
use crate::{trace, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// The caller's.
    Main,
    Draw,
    Centers,
    Exchange,
}

const LANES: [Lane; 4] = [Lane::Main, Lane::Draw, Lane::Centers, Lane::Exchange];

pub(super) struct Lanes {
    /// In the order of `LANES`.
    streams: [Stream; 4],
    reached: [Event; 4],
    alone: bool,
    tracer: Option<RefCell<Tracer>>,
}

impl Lanes {
    pub fn new(context: &Arc<Context>, main: &Stream, ranks: u32) -> Result<Lanes> {
        // SAFETY: the caller's stream outlives the device, and so its heads.
        let main = unsafe { Stream::borrowed(context, main.raw()) };
        // Collectives are short, and other ranks wait for them; what a trainer waits for is on the caller's stream.
        let (draw, centers) = (Stream::new(context, Priority::Least)?, Stream::new(context, Priority::Least)?);
        let exchange = Stream::new(context, Priority::Greatest)?;
        let tracer = match trace::is_on() {
            true => Some(RefCell::new(Tracer::new(context, &main)?)),
            false => None,
        };
        let event = || Event::new(context);
        Ok(Lanes {
            streams: [main, draw, centers, exchange],
            reached: [event()?, event()?, event()?, event()?],
            alone: ranks == 1,
            tracer,
        })
    }

    pub fn of(&self, lane: Lane) -> &Stream {
        &self.streams[lane as usize]
    }

    /// Where ranks exchange what `from` has made: one that is alone has nothing to wait for.
    pub fn exchange(&self, from: Lane) -> Lane {
        if self.alone {
            from
        } else {
            Lane::Exchange
        }
    }

    /// What is enqueued on `later` from here on comes after all that is on `earlier` now.
    pub fn join(&self, later: Lane, earlier: Lane) -> Result<()> {
        if later == earlier {
            return Ok(());
        }
        let reached = &self.reached[earlier as usize];
        reached.record(self.of(earlier))?;
        self.of(later).wait(reached)
    }

    /// Waits, on the host, for everything enqueued.
    pub fn synchronize(&self) -> Result<()> {
        LANES.iter().try_for_each(|&lane| self.of(lane).synchronize())?;
        self.settle();
        Ok(())
    }

    /// From here to `end`, what is enqueued on the lane is a span of the trace.
    pub fn begin(&self, lane: Lane) -> Option<Event> {
        let tracer = self.tracer.as_ref()?;
        tracer.borrow().moment(self.of(lane))
    }

    pub fn end(&self, lane: Lane, begun: Option<Event>, scope: trace::Scope, name: &str) {
        if let (Some(tracer), Some(begin)) = (&self.tracer, begun) {
            tracer.borrow_mut().end(self.of(lane), begin, scope, lane, name);
        }
    }

    /// Hands the trace what is over.
    pub fn settle(&self) {
        if let Some(tracer) = &self.tracer {
            tracer.borrow_mut().settle();
        }
    }
}

/// A span whose end the host may not know yet.
struct Pending {
    name: String,
    lane: Lane,
    scope: trace::Scope,
    begin: Event,
    end: Event,
}

/// Spans by events around what a lane runs.
struct Tracer {
    context: Arc<Context>,
    /// A moment of the device's, and where it is on the trace's time line.
    base: Event,
    base_us: f64,
    pending: Vec<Pending>,
}

impl Tracer {
    fn new(context: &Arc<Context>, main: &Stream) -> Result<Tracer> {
        let base = Event::timed(context)?;
        base.record(main)?;
        base.synchronize()?;
        Ok(Tracer { context: context.clone(), base, base_us: trace::now(), pending: Vec::new() })
    }

    /// A trace does without a moment that cannot be had: the step goes on.
    fn moment(&self, stream: &Stream) -> Option<Event> {
        let made = Event::timed(&self.context).and_then(|event| event.record(stream).map(|()| event));
        made.map_err(|error| log::debug!("trace: {error}")).ok()
    }

    fn end(&mut self, stream: &Stream, begin: Event, scope: trace::Scope, lane: Lane, name: &str) {
        if let Some(end) = self.moment(stream) {
            self.pending.push(Pending { name: name.into(), lane, scope, begin, end });
        }
    }

    fn settle(&mut self) {
        let spans = std::mem::take(&mut self.pending);
        let (over, pending): (Vec<_>, Vec<_>) = spans.into_iter().partition(|span| span.end.is_over().unwrap_or(true));
        self.pending = pending;
        for span in over {
            if let Err(error) = self.tell(span) {
                log::debug!("trace: {error}");
            }
        }
    }

    fn tell(&mut self, span: Pending) -> Result<()> {
        let track = match span.lane {
            Lane::Main => "main stream",
            Lane::Draw => "draw stream",
            Lane::Centers => "centers stream",
            Lane::Exchange => "exchange stream",
        };
        let (start, duration) = (self.base_us + span.begin.since(&self.base)?, span.end.since(&span.begin)?);
        span.scope.add(&span.name, track, start, duration);
        // The driver counts in float32 milliseconds: near a base they are exact.
        (self.base, self.base_us) = (span.begin, start);
        Ok(())
    }
}
