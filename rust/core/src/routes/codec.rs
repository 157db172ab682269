//! The contract of a codec: a row of numbers to a record of fixed width, and back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::routes::code::Code;
use crate::routes::scalar::{F16, F32, Q8};

/// What the numbers of a row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Routing logits z, G * K of them.
    Logits,
    /// A code c, from which a decoder makes the logits.
    Code,
}

/// How the rows of a segment are kept.
pub trait Codec: fmt::Debug + Send + Sync {
    fn keeps(&self) -> Keeps;

    /// Numbers in a row.
    fn columns(&self) -> usize;

    /// Bytes in a record.
    fn record_bytes(&self) -> usize;

    /// Whether the numbers are kept in units of a scale per column.
    fn scaled(&self) -> bool;

    /// The largest magnitude that it can keep, whatever the scales.
    fn limit(&self) -> f32;

    /// `row` has `columns` finite numbers within the limit and within the scales.
    fn encode(&self, row: &[f32], scales: &[f32], record: &mut Vec<u8>);

    /// `record` has `record_bytes` bytes, `row` and, if scaled, `scales` have `columns` numbers.
    fn decode(&self, record: &[u8], scales: &[f32], row: &mut [f32]);

    /// The largest |decoded - value| for a value of a column with this scale.
    fn error_bound(&self, value: f32, scale: f32) -> f32;
}

/// A codec by name, as users write it and manifests record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum CodecName {
    F32,
    F16,
    Q8,
    Code(u32),
}

impl CodecName {
    pub const KNOWN: &str = "f32, f16, q8, code(d)";
    const MAX_CODE: u32 = 65_536;

    /// The codec for a store whose documents have `logits` logits.
    pub fn build(self, logits: usize) -> Box<dyn Codec> {
        match self {
            CodecName::F32 => Box::new(F32::new(logits)),
            CodecName::F16 => Box::new(F16::new(logits)),
            CodecName::Q8 => Box::new(Q8::new(logits)),
            CodecName::Code(d) => Box::new(Code::new(d as usize)),
        }
    }

    pub fn keeps(self) -> Keeps {
        match self {
            CodecName::Code(_) => Keeps::Code,
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
            CodecName::Code(d) => write!(f, "code({d})"),
        }
    }
}

impl FromStr for CodecName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let unknown = || {
            Error::InvalidInput(format!(
                "codec {name:?} is unknown: this version knows {}, with d from 1 to {}",
                Self::KNOWN,
                Self::MAX_CODE
            ))
        };
        match name {
            "f32" => Ok(CodecName::F32),
            "f16" => Ok(CodecName::F16),
            "q8" => Ok(CodecName::Q8),
            _ => {
                let d = name
                    .strip_prefix("code(")
                    .and_then(|rest| rest.strip_suffix(')'))
                    .and_then(|digits| digits.parse::<u32>().ok())
                    .filter(|d| (1..=Self::MAX_CODE).contains(d))
                    .ok_or_else(unknown)?;
                let codec = CodecName::Code(d);
                // One spelling a codec: no "code(064)", no "code(+64)".
                if codec.to_string() == name {
                    Ok(codec)
                } else {
                    Err(unknown())
                }
            }
        }
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
