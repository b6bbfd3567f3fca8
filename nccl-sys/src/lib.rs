//! NCCL's C interface, as [`Nccl`]: a library opened at run time and a field for each of its functions.
//!
//! Nothing of CUDA or NCCL is needed to build or to link. The bindings are those of NCCL [`VERSION`]; an older library lacks some of
//! the functions, whose fields are then an `Err`. Call through the fields (`(nccl.ncclCommAbort.as_ref()?)(comm)`): the methods of the
//! same names panic where a function is missing.
//!
//! `src/bindings.rs` is made from nccl.h by `examples/bindings.rs`, whose head has the command.

// As bindgen writes them, which is not as rustfmt would.
#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs, rustdoc::all, clippy::all)]
#[rustfmt::skip]
mod bindings;

pub use bindings::*;

/// Of the header that the bindings were made from: major * 10000 + minor * 100 + patch.
pub const VERSION: u32 = NCCL_VERSION_CODE;

/// A configuration in which nothing is set, as `NCCL_CONFIG_INITIALIZER` makes it.
pub fn unset_config() -> ncclConfig_t {
    const UNSET: i32 = i32::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: NCCL_API_MAGIC,
        version: VERSION,
        blocking: UNSET,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: std::ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
        graphStreamOrdering: UNSET,
        launchOrderImplicit: UNSET,
        numRmaSig: UNSET,
        rmaEagerInit: UNSET,
        hostCftMode: UNSET,
        nvlsHostMode: UNSET,
    }
}
