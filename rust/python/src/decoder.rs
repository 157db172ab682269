//! A decoder as a caller gives it: a tuple (V, b) of arrays.

use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use polyprag_core::DecoderInput;
use pyo3::prelude::*;

use crate::arrays;
use crate::errors::invalid;

#[derive(Debug)]
pub struct GivenDecoder<'py> {
    v: PyReadonlyArrayDyn<'py, f32>,
    b: PyReadonlyArrayDyn<'py, f32>,
}

impl<'py> GivenDecoder<'py> {
    pub fn new(pair: &Bound<'py, PyAny>) -> PyResult<Self> {
        match pair.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>() {
            Ok((v, b)) => Ok(Self {
                v: arrays::float32("decoder V", &v)?,
                b: arrays::float32("decoder b", &b)?,
            }),
            Err(_) => Err(invalid(
                pair.py(),
                "decoder: expected a tuple (V, b) of two arrays",
            )),
        }
    }

    /// The projection that belongs to it has the shape of V turned round.
    pub fn projection(&self, p: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArrayDyn<'py, f32>> {
        let p = arrays::float32("projection", p)?;
        let expected: Vec<usize> = self.v.shape().iter().rev().copied().collect();
        match p.shape() == expected {
            true => Ok(p),
            false => Err(invalid(
                p.py(),
                format!(
                    "projection: expected shape {expected:?}, as V has {:?}, got {:?}",
                    self.v.shape(),
                    p.shape()
                ),
            )),
        }
    }

    pub fn core(&self) -> PyResult<DecoderInput<'_>> {
        Ok(DecoderInput {
            v: bytemuck::cast_slice(self.v.as_slice()?),
            v_shape: self.v.shape(),
            b: bytemuck::cast_slice(self.b.as_slice()?),
            b_shape: self.b.shape(),
        })
    }
}
