//! A head's streams, and what orders them.
//!
//! The caller's stream has the step from the embeddings to their gradient. Beside it run the draw of the next step; the work on the
//! class centers (their gradient, the update, the gather for a step that is prepared); and, with several ranks, the collectives.
//! Work on one stream comes after work on another only where `join` says so.

use std::cell::RefCell;
use std::sync::Arc;

use super::driver::{Context, Event, Priority, Stream};
use crate::{trace, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamRole {
    /// The caller's.
    Main,
    Draw,
    Centers,
    Exchange,
}

const ROLES: [StreamRole; 4] = [StreamRole::Main, StreamRole::Draw, StreamRole::Centers, StreamRole::Exchange];

pub(super) struct HeadStreams {
    /// In the order of `ROLES`.
    streams: [Stream; 4],
    reached: [Event; 4],
    /// The head's last work on the caller's stream.
    left: Event,
    single_rank: bool,
    tracer: Option<RefCell<Tracer>>,
}

impl HeadStreams {
    pub fn new(context: &Arc<Context>, main: &Stream, ranks: u32) -> Result<HeadStreams> {
        // SAFETY: the caller's stream outlives the device, and so its heads.
        let main = unsafe { Stream::borrowed(context, main.raw()) };
        // Collectives are short, and other ranks wait for them. The least priority is also that of an ordinary stream, such as the caller's.
        let (draw, centers) = (Stream::new(context, Priority::Least)?, Stream::new(context, Priority::Least)?);
        let exchange = Stream::new(context, Priority::Greatest)?;
        let tracer = match trace::is_on() {
            true => Some(RefCell::new(Tracer::new(context, &main)?)),
            false => None,
        };
        let event = || Event::new(context);
        Ok(HeadStreams {
            streams: [main, draw, centers, exchange],
            reached: [event()?, event()?, event()?, event()?],
            left: event()?,
            single_rank: ranks == 1,
            tracer,
        })
    }

    pub fn of(&self, role: StreamRole) -> &Stream {
        &self.streams[role as usize]
    }

    /// The stream of an exchange of what `from` has computed: a single rank has nothing to wait for.
    pub fn exchange_role(&self, from: StreamRole) -> StreamRole {
        if self.single_rank {
            from
        } else {
            StreamRole::Exchange
        }
    }

    /// Work that is enqueued on `later` from here on comes after all that is on `earlier` now.
    pub fn join(&self, later: StreamRole, earlier: StreamRole) -> Result<()> {
        if later == earlier {
            return Ok(());
        }
        let reached = &self.reached[earlier as usize];
        reached.record(self.of(earlier))?;
        self.of(later).wait(reached)
    }

    /// To be called when a call has enqueued its last on the caller's stream.
    pub fn leave_main(&self) -> Result<()> {
        self.left.record(self.of(StreamRole::Main))
    }

    /// Waits, on the host, for what the head has left on the caller's stream; that may be captured now, and then it cannot be waited for.
    pub fn wait_for_main(&self) -> Result<()> {
        self.left.synchronize()
    }

    /// Waits, on the host, for everything enqueued.
    pub fn synchronize(&self) -> Result<()> {
        ROLES.iter().try_for_each(|&role| self.of(role).synchronize())?;
        self.add_finished_spans();
        Ok(())
    }

    /// Work that is enqueued on the stream from here to `end_span` is a span of the trace.
    pub fn begin_span(&self, role: StreamRole) -> Option<Event> {
        let tracer = self.tracer.as_ref()?;
        tracer.borrow().record_event(self.of(role))
    }

    pub fn end_span(&self, role: StreamRole, begun: Option<Event>, scope: trace::Scope, name: &str) {
        if let (Some(tracer), Some(begin)) = (&self.tracer, begun) {
            tracer.borrow_mut().end_span(self.of(role), begin, scope, role, name);
        }
    }

    /// Gives the trace the spans that are over.
    pub fn add_finished_spans(&self) {
        if let Some(tracer) = &self.tracer {
            tracer.borrow_mut().add_finished_spans();
        }
    }
}

/// A span whose end the host may not know yet.
struct Pending {
    name: String,
    role: StreamRole,
    scope: trace::Scope,
    begin: Event,
    end: Event,
}

/// Measures spans with events around the work of a stream.
struct Tracer {
    context: Arc<Context>,
    /// An event, and its time on the trace's time line.
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

    /// If an event fails, the trace lacks a span and the step goes on.
    fn record_event(&self, stream: &Stream) -> Option<Event> {
        let made = Event::timed(&self.context).and_then(|event| event.record(stream).map(|()| event));
        made.map_err(|error| log::debug!("trace: {error}")).ok()
    }

    fn end_span(&mut self, stream: &Stream, begin: Event, scope: trace::Scope, role: StreamRole, name: &str) {
        if let Some(end) = self.record_event(stream) {
            self.pending.push(Pending { name: name.into(), role, scope, begin, end });
        }
    }

    fn add_finished_spans(&mut self) {
        let spans = std::mem::take(&mut self.pending);
        let (over, pending): (Vec<_>, Vec<_>) = spans.into_iter().partition(|span| span.end.is_over().unwrap_or(true));
        self.pending = pending;
        for span in over {
            if let Err(error) = self.add_span(span) {
                log::debug!("trace: {error}");
            }
        }
    }

    fn add_span(&mut self, span: Pending) -> Result<()> {
        let track = match span.role {
            StreamRole::Main => "main stream",
            StreamRole::Draw => "draw stream",
            StreamRole::Centers => "centers stream",
            StreamRole::Exchange => "exchange stream",
        };
        let (start, duration) = (self.base_us + span.begin.since(&self.base)?, span.end.since(&span.begin)?);
        span.scope.add(&span.name, track, start, duration);
        // The driver counts in float32 milliseconds: near a base they are exact.
        (self.base, self.base_us) = (span.begin, start);
        Ok(())
    }
}
