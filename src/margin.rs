//! The margin on the target logit: target logit = scale * (cos(m1 * theta + m2) - m3).

/// Which derivative the margin has on the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum MarginGradient {
    /// The derivative of the formula.
    Exact = 1,
    /// 1, as the reference implementation has it since 2022-12.
    StraightThrough = 2,
}

/// Scale, margins and the inter-class filter: everything between a cosine and a logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    pub scale: f64,
    pub m1: f64,
    pub m2: f64,
    pub m3: f64,
    /// A negative's cosine above it becomes 0; 0 is off.
    pub interclass_filter: f64,
    pub gradient: MarginGradient,
    /// Keep the target logit monotone beyond theta = pi - m2.
    pub guard: bool,
}
