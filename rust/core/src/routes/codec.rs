//! The contract of a codec: a row of numbers to a record of fixed width, and back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::routes::levels::Levels;
use crate::routes::quantised::Quantised;
use crate::routes::scalar::{F16, F32};
use crate::routes::scales::ScaleValues;
use crate::routes::sparse::Sparse;

/// What the numbers of a row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Routing logits z, G * K of them.
    Logits,
    /// A code c, from which a decoder makes the logits.
    Code,
    /// Weights w, from which no logits can be had.
    Weights,
}

impl fmt::Display for Keeps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Keeps::Logits => "logits",
            Keeps::Code => "codes",
            Keeps::Weights => "weights",
        })
    }
}

/// How the rows of a segment are kept.
pub trait Codec: fmt::Debug + Send + Sync {
    fn keeps(&self) -> Keeps;

    /// Numbers in a row.
    fn columns(&self) -> usize;

    /// Bytes in a record.
    fn record_bytes(&self) -> usize;

    /// The levels to which numbers are rounded, if the codec keeps them in units of a scale per column.
    fn levels(&self) -> Option<Levels>;

    /// Whether the codec needs scales; one that does not takes [`ScaleValues::none`].
    fn scaled(&self) -> bool {
        self.levels().is_some()
    }

    /// Whether it can keep this row, or why not. `row` has `columns` numbers.
    fn check(&self, row: &[f32]) -> Result<(), String>;

    /// `row` has passed `check`, and the scales cover it.
    fn encode(&self, row: &[f32], scales: &ScaleValues, record: &mut Vec<u8>);

    /// `record` has `record_bytes` bytes; `row` and, if scaled, `scales` have `columns` numbers. Any record decodes:
    /// if scaled or of weights, to finite numbers.
    fn decode(&self, record: &[u8], scales: &ScaleValues, row: &mut [f32]);

    /// The largest |decoded - value| for a value of a column with this centre and scale.
    fn error_bound(&self, value: f32, centre: f32, scale: f32) -> f32;
}

/// That all are finite, and none of a larger magnitude than `limit`.
pub(super) fn check_numbers(row: &[f32], limit: f32) -> Result<(), String> {
    let bad = |x: &f32| x.is_nan() || x.abs() > limit;
    match row.iter().enumerate().find(|(_, x)| bad(x)) {
        None => Ok(()),
        Some((i, x)) => Err(format!(
            "number {i} is {x}, and this codec keeps finite numbers up to {limit:e}"
        )),
    }
}

/// A codec by name, as users write it and manifests record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum CodecName {
    F32,
    F16,
    Q8,
    Q4,
    Q2,
    Q1,
    /// This many numbers as int8.
    Code(u32),
    /// This many numbers in 4 bits each.
    CodeInt4(u32),
    /// This many weights of each group.
    Sparse(u32),
}

impl CodecName {
    pub const KNOWN: &str = "f32, f16, q8, q4, q2, q1, code(d), code(d,int4), sparse(k)";
    const MAX_CODE: u32 = 65_536;
    const MAX_SPARSE: u32 = 65_535;

    /// The codec for a store whose documents have `groups` groups of `experts` logits.
    pub fn build(self, groups: usize, experts: usize) -> Box<dyn Codec> {
        let logits = groups * experts;
        let quantised = |levels| Box::new(Quantised::new(Keeps::Logits, logits, levels));
        let code = |d, levels| Box::new(Quantised::new(Keeps::Code, d as usize, levels));
        match self {
            CodecName::F32 => Box::new(F32::new(logits)),
            CodecName::F16 => Box::new(F16::new(logits)),
            CodecName::Q8 => quantised(Levels::Int8),
            CodecName::Q4 => quantised(Levels::Bits4),
            CodecName::Q2 => quantised(Levels::Bits2),
            CodecName::Q1 => quantised(Levels::Bits1),
            CodecName::Code(d) => code(d, Levels::Int8),
            CodecName::CodeInt4(d) => code(d, Levels::Bits4),
            CodecName::Sparse(k) => Box::new(Sparse::new(groups, experts, k as usize)),
        }
    }

    pub fn keeps(self) -> Keeps {
        match self {
            CodecName::Code(_) | CodecName::CodeInt4(_) => Keeps::Code,
            CodecName::Sparse(_) => Keeps::Weights,
            _ => Keeps::Logits,
        }
    }
}

impl fmt::Display for CodecName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CodecName::F32 => f.write_str("f32"),
            CodecName::F16 => f.write_str("f16"),
            CodecName::Q8 => f.write_str("q8"),
            CodecName::Q4 => f.write_str("q4"),
            CodecName::Q2 => f.write_str("q2"),
            CodecName::Q1 => f.write_str("q1"),
            CodecName::Code(d) => write!(f, "code({d})"),
            CodecName::CodeInt4(d) => write!(f, "code({d},int4)"),
            CodecName::Sparse(k) => write!(f, "sparse({k})"),
        }
    }
}

impl FromStr for CodecName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let number = |rest: &str, end: &str, max: u32| {
            let n = rest.strip_suffix(end)?.parse::<u32>().ok()?;
            (1..=max).contains(&n).then_some(n)
        };
        let numbered = || {
            if let Some(k) = name.strip_prefix("sparse(") {
                return number(k, ")", Self::MAX_SPARSE).map(CodecName::Sparse);
            }
            let d = name.strip_prefix("code(")?;
            number(d, ")", Self::MAX_CODE)
                .map(CodecName::Code)
                .or_else(|| number(d, ",int4)", Self::MAX_CODE).map(CodecName::CodeInt4))
        };
        let codec = match name {
            "f32" => Some(CodecName::F32),
            "f16" => Some(CodecName::F16),
            "q8" => Some(CodecName::Q8),
            "q4" => Some(CodecName::Q4),
            "q2" => Some(CodecName::Q2),
            "q1" => Some(CodecName::Q1),
            _ => numbered(),
        };
        codec
            // One spelling a codec: no "code(064)", no "code(+64)".
            .filter(|codec| codec.to_string() == name)
            .ok_or_else(|| {
                Error::InvalidInput(format!(
                    "codec {name:?} is unknown: this version knows {}, with d from 1 to {} and k from 1 to {}",
                    Self::KNOWN,
                    Self::MAX_CODE,
                    Self::MAX_SPARSE
                ))
            })
    }
}

impl From<CodecName> for String {
    fn from(codec: CodecName) -> String {
        codec.to_string()
    }
}

impl TryFrom<String> for CodecName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        name.parse()
    }
}
