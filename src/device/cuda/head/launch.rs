//! A head's launches and exchanges on its streams: each is a span of the trace, and the first error is remembered.

use super::super::context::Gpu;
use super::super::driver::{Event, Stream};
use super::super::products::Products;
use super::super::streams::StreamRole;
use super::CudaHead;
use crate::exchange::Exchange;
use crate::matrix::DType;
use crate::{trace, Result};

/// Launches a kernel on one of the head's streams, as a span of the trace. An error is remembered until a call can return it. After
/// an error nothing is launched any more: kernels need the results of those before them.
macro_rules! run {
    ($head:expr, $role:ident, $entry:ident, $arguments:expr) => {{
        let arguments = $arguments;
        // SAFETY: the head's own arrays, as large as its sizes say, and what the callers of its phases answer for.
        $head.traced(StreamRole::$role, stringify!($entry), |gpu, stream| unsafe { gpu.entries.$entry.launch(stream, arguments) });
    }};
}
pub(super) use run;

/// An exchange that has been handed out, and whose result nobody uses yet.
pub(super) struct OpenExchange {
    role: StreamRole,
    begun: Option<Event>,
    scope: trace::Scope,
    name: &'static str,
}

/// The buffers of a collective.
pub(super) struct ExchangeBuffers<T> {
    pub send: *mut T,
    pub recv: *mut T,
    pub count: usize,
}

impl CudaHead {
    /// The value, or nothing once the error is remembered.
    pub(super) fn remember_error<T>(&mut self, outcome: Result<T>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.first_error.get_or_insert(error);
                None
            }
        }
    }

    /// The error that is remembered, if there is one.
    pub(super) fn pending_error(&self) -> Result<()> {
        self.first_error.clone().map_or(Ok(()), Err)
    }

    /// As `run!` for anything that enqueues on a stream.
    pub(super) fn traced(&mut self, role: StreamRole, name: &'static str, launch: impl FnOnce(&Gpu, &Stream) -> Result<()>) {
        let draft = if role == StreamRole::Draw { self.next() } else { self.current };
        self.traced_for(draft, role, name, launch);
    }

    /// The same as a span of this draft's step.
    pub(super) fn traced_for(
        &mut self,
        draft: usize,
        role: StreamRole,
        name: &'static str,
        launch: impl FnOnce(&Gpu, &Stream) -> Result<()>,
    ) {
        if self.first_error.is_none() {
            let begun = self.streams.begin_span(role);
            let launched = launch(&self.gpu, self.streams.of(role));
            self.streams.end_span(role, begun, self.scope(draft), name);
            self.remember_error(launched);
        }
    }

    pub(super) fn product(&mut self, role: StreamRole, name: &'static str, launch: impl FnOnce(&Products, &Stream) -> Result<()>) {
        self.traced(role, name, |gpu, stream| launch(&gpu.products, stream));
    }

    /// The scope of a draft's spans.
    fn scope(&self, draft: usize) -> trace::Scope {
        trace::Scope { rank: self.spec.rank, ranks: self.spec.ranks, step: self.drafts[draft].step }
    }

    pub(super) fn join(&mut self, later: StreamRole, earlier: StreamRole) {
        let joined = self.streams.join(later, earlier);
        self.remember_error(joined);
    }

    pub(super) fn leave_main(&mut self) {
        let left = self.streams.leave_main();
        self.remember_error(left);
    }

    /// Hands out an exchange of what `from` has computed; `received` says which stream uses the result.
    pub(super) fn exchange<T>(
        &mut self,
        name: &'static str,
        from: StreamRole,
        buffers: ExchangeBuffers<T>,
        dtype: DType,
    ) -> Exchange {
        let role = self.streams.exchange_role(from);
        self.end_exchange();
        self.join(role, from);
        let draft = if from == StreamRole::Draw { self.next() } else { self.current };
        self.open_exchange = Some(OpenExchange { role, begun: self.streams.begin_span(role), scope: self.scope(draft), name });
        Exchange {
            send: buffers.send.cast_const().cast(),
            recv: buffers.recv.cast(),
            count: buffers.count,
            dtype,
            stream: self.streams.of(role).raw(),
            memory: Some(self.gpu.clone()),
            failure: self.first_error.clone(),
        }
    }

    /// Work that `by` runs from here on comes after the last exchange.
    pub(super) fn received(&mut self, by: StreamRole) {
        if let Some(role) = self.end_exchange() {
            self.join(by, role);
        }
    }

    /// Ends the span of the last exchange. After a failed step its result may never be used.
    fn end_exchange(&mut self) -> Option<StreamRole> {
        let OpenExchange { role, begun, scope, name } = self.open_exchange.take()?;
        self.streams.end_span(role, begun, scope, name);
        Some(role)
    }
}
