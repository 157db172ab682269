//! The dtypes of tensors, and their numbers from and to f32. Little endian.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    /// Integers from -127 to 127. What they mean, scales beside them say.
    Int8,
}

impl Dtype {
    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::Int8];

    /// Bytes of one number.
    pub fn width(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::Int8 => 1,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::Int8 => "int8",
        }
    }

    /// Whether f32 numbers may have been rounded to be written so.
    pub fn is_lossy(self) -> bool {
        self != Dtype::F32
    }

    pub(crate) fn raw(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Int8 => safetensors::Dtype::I8,
        }
    }

    pub(crate) fn from_raw(raw: safetensors::Dtype) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.raw() == raw)
    }

    /// Appends the numbers that `bytes` holds.
    pub(crate) fn decode(self, bytes: &[u8], numbers: &mut Vec<f32>) {
        let words = bytes.as_chunks::<2>().0.iter().copied();
        match self {
            Dtype::F32 => {
                let words = bytes.as_chunks::<4>().0.iter().copied();
                numbers.extend(words.map(f32::from_le_bytes));
            }
            Dtype::Bf16 => numbers.extend(words.map(|w| bf16::from_le_bytes(w).to_f32())),
            Dtype::F16 => numbers.extend(words.map(|w| f16::from_le_bytes(w).to_f32())),
            Dtype::Int8 => numbers.extend(bytes.iter().map(|b| f32::from(b.cast_signed()))),
        }
    }

    /// Appends finite numbers, each as the nearest that there is (of two, the even one). For int8 they must be
    /// integers. Fails with the first that is too large.
    pub(crate) fn encode(self, numbers: &[f32], bytes: &mut Vec<u8>) -> Result<(), f32> {
        let too_large = match self {
            Dtype::F32 => None,
            Dtype::Bf16 => numbers.iter().find(|x| bf16::from_f32(**x).is_infinite()),
            Dtype::F16 => numbers.iter().find(|x| f16::from_f32(**x).is_infinite()),
            Dtype::Int8 => numbers.iter().find(|x| x.abs() > 127.0),
        };
        if let Some(x) = too_large {
            return Err(*x);
        }
        match self {
            Dtype::F32 => bytes.extend(numbers.iter().flat_map(|x| x.to_le_bytes())),
            Dtype::Bf16 => {
                bytes.extend(
                    numbers
                        .iter()
                        .flat_map(|x| bf16::from_f32(*x).to_le_bytes()),
                );
            }
            Dtype::F16 => {
                bytes.extend(numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
            }
            Dtype::Int8 => bytes.extend(numbers.iter().map(|x| (*x as i8).cast_unsigned())),
        }
        Ok(())
    }

    /// What is in `bytes` that no writer writes, if there is anything: it would poison every answer.
    pub(crate) fn fault(self, bytes: &[u8]) -> Option<&'static str> {
        let mut words = bytes.as_chunks::<2>().0.iter().copied();
        let sound = match self {
            Dtype::F32 => {
                let mut words = bytes.as_chunks::<4>().0.iter().copied();
                words.all(|w| f32::from_le_bytes(w).is_finite())
            }
            Dtype::Bf16 => words.all(|w| bf16::from_le_bytes(w).is_finite()),
            Dtype::F16 => words.all(|w| f16::from_le_bytes(w).is_finite()),
            Dtype::Int8 => bytes.iter().all(|b| b.cast_signed() != i8::MIN),
        };
        match (sound, self) {
            (true, _) => None,
            (false, Dtype::Int8) => Some("-128"),
            (false, _) => Some("NaN or infinity"),
        }
    }
}

impl Display for Dtype {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|d| d.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Dtype::name).join(", ");
            Error::invalid(format!("dtype: expected one of {known}, got {name:?}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn finite() -> impl Strategy<Value = f32> {
        any::<u32>()
            .prop_map(f32::from_bits)
            .prop_filter("finite", |x| x.is_finite())
    }

    fn there_and_back(dtype: Dtype, x: f32) -> Result<f32, f32> {
        let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
        dtype.encode(&[x], &mut bytes)?;
        assert_eq!(bytes.len(), dtype.width());
        dtype.decode(&bytes, &mut numbers);
        Ok(numbers[0])
    }

    /// Half a unit in the last of `digits` binary digits, or half of the smallest number.
    fn bound(x: f32, digits: i32, smallest: f64) -> f64 {
        (f64::from(x).abs() * 2f64.powi(-digits)).max(smallest / 2.0)
    }

    proptest! {
        #[test]
        fn numbers_are_rounded_to_the_nearest(x in finite()) {
            let error = |y: f32| (f64::from(y) - f64::from(x)).abs();
            prop_assert_eq!(there_and_back(Dtype::F32, x).unwrap().to_bits(), x.to_bits());
            // 8 digits, down to 2^-133; at and above 2^128 - 2^119 there is nothing.
            match there_and_back(Dtype::Bf16, x) {
                Ok(y) => prop_assert!(error(y) <= bound(x, 8, 2f64.powi(-133)), "{} as {}", x, y),
                Err(y) => prop_assert!(y == x && f64::from(x).abs() >= 2f64.powi(128) - 2f64.powi(119)),
            }
            // 11 digits, from 2^-24 to 65,504.
            match there_and_back(Dtype::F16, x) {
                Ok(y) => prop_assert!(error(y) <= bound(x, 11, 2f64.powi(-24)), "{} as {}", x, y),
                Err(y) => prop_assert!(y == x && x.abs() >= 65_520.0),
            }
        }

        #[test]
        fn numbers_that_a_dtype_has_stay_as_they_are(bits in any::<u16>()) {
            for dtype in [Dtype::Bf16, Dtype::F16] {
                let raw = bits.to_le_bytes();
                let (mut numbers, mut bytes) = (Vec::new(), Vec::new());
                dtype.decode(&raw, &mut numbers);
                let finite = numbers[0].is_finite();
                prop_assert_eq!(dtype.fault(&raw).is_none(), finite);
                if finite {
                    dtype.encode(&numbers, &mut bytes).unwrap();
                    prop_assert_eq!(&bytes, &raw);
                }
            }
        }
    }

    #[test]
    fn of_two_that_are_as_near_the_even_one_is_taken() {
        // One and a half units above 1, and half a unit.
        assert_eq!(
            there_and_back(Dtype::Bf16, 1.0 + 0.75 / 64.0),
            Ok(1.0 + 1.0 / 64.0)
        );
        assert_eq!(there_and_back(Dtype::Bf16, 1.0 + 0.25 / 64.0), Ok(1.0));
        assert_eq!(
            there_and_back(Dtype::F16, 1.0 + 0.75 / 512.0),
            Ok(1.0 + 1.0 / 512.0)
        );
        assert_eq!(there_and_back(Dtype::F16, 1.0 + 0.25 / 512.0), Ok(1.0));
        assert_eq!(there_and_back(Dtype::F16, 65_519.0), Ok(65_504.0));
        assert_eq!(there_and_back(Dtype::F16, -65_520.0), Err(-65_520.0));
    }

    #[test]
    fn every_integer_of_int8_but_the_lowest() {
        for i in -127i8..=127 {
            assert_eq!(there_and_back(Dtype::Int8, f32::from(i)), Ok(f32::from(i)));
            assert_eq!(Dtype::Int8.fault(&[i.cast_unsigned()]), None);
        }
        assert_eq!(there_and_back(Dtype::Int8, -128.0), Err(-128.0));
        assert_eq!(Dtype::Int8.fault(&[0, 0x80]), Some("-128"));
    }

    #[test]
    fn what_is_not_finite_is_found() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Dtype::F32.fault(&x.to_le_bytes()).is_some());
            assert!(
                Dtype::Bf16
                    .fault(&bf16::from_f32(x).to_le_bytes())
                    .is_some()
            );
            assert!(Dtype::F16.fault(&f16::from_f32(x).to_le_bytes()).is_some());
        }
    }

    #[test]
    fn names_lead_back() {
        for dtype in Dtype::ALL {
            assert_eq!(dtype.name().parse::<Dtype>().unwrap(), dtype);
            assert_eq!(Dtype::from_raw(dtype.raw()), Some(dtype));
            assert_eq!(dtype.is_lossy(), dtype != Dtype::F32);
        }
        let error = "float64".parse::<Dtype>().unwrap_err().to_string();
        assert!(
            error.contains("float32, bfloat16, float16, int8"),
            "{error}"
        );
        assert_eq!(Dtype::from_raw(safetensors::Dtype::F64), None);
    }
}
