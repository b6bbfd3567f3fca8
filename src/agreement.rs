//! What ranks must agree on.

/// A value that must be equal on all ranks, compared by its bits.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub(crate) name: &'static str,
    pub(crate) bits: u64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Int,
    Signed,
    Float,
}

impl Field {
    pub fn int(name: &'static str, value: u64) -> Field {
        Field { name, bits: value, kind: Kind::Int }
    }

    pub fn signed(name: &'static str, value: i64) -> Field {
        Field { name, bits: value as u64, kind: Kind::Signed }
    }

    /// 0.0 and -0.0 differ, equal NaNs do not.
    pub fn float(name: &'static str, value: f64) -> Field {
        Field { name, bits: value.to_bits(), kind: Kind::Float }
    }

    /// The bits of any rank's, as a number.
    pub(crate) fn show(&self, bits: u64) -> String {
        match self.kind {
            Kind::Int => bits.to_string(),
            Kind::Signed => (bits as i64).to_string(),
            Kind::Float => format!("{:?}", f64::from_bits(bits)),
        }
    }
}
