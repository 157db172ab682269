//! Ids in numpy arrays: no Python object is made for any of them.

use numpy::{
    Element, PyArray1, PyArrayDescrMethods, PyArrayMethods, PyReadonlyArray1, PyUntypedArray,
    PyUntypedArrayMethods,
};
use polyprag_core::DocumentId;
use pyo3::prelude::*;

use crate::arrays::contiguous;
use crate::errors::invalid;
use crate::ids::Batch;

/// None for an array of neither integers nor text: its elements say themselves what is wrong with them.
pub fn read<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Option<Batch<'py>>> {
    Ok(match (array.dtype().kind(), array.dtype().itemsize()) {
        (b'u', _) => Some(Batch::U64(numbers(array, "uint64")?)),
        (b'i', _) => {
            let signed: PyReadonlyArray1<'_, i64> = numbers(array, "int64")?;
            if let Some(id) = signed.as_slice()?.iter().find(|id| **id < 0) {
                let message = format!("id {id}: expected an int from 0 to 2**64 - 1");
                return Err(invalid(array.py(), message));
            }
            Some(Batch::U64(numbers(array, "uint64")?))
        }
        (b'S', width) if width > 0 => Some(Batch::Any(bytes(array, width)?)),
        (b'U', width) if width > 0 => Some(Batch::Any(characters(array, width)?)),
        _ => None,
    })
}

fn bytes(array: &Bound<'_, PyUntypedArray>, width: usize) -> PyResult<Vec<DocumentId>> {
    let bytes: PyReadonlyArray1<'_, u8> = units(array, "uint8")?;
    let ids = bytes.as_slice()?.chunks_exact(width).map(|id| {
        let id = unpadded(id);
        match std::str::from_utf8(id) {
            Ok(text) => Ok(text.into()),
            Err(_) => Err(invalid(
                array.py(),
                format!("id b\"{}\": not UTF-8", id.escape_ascii()),
            )),
        }
    });
    ids.collect()
}

/// numpy has four bytes for each.
fn characters(array: &Bound<'_, PyUntypedArray>, width: usize) -> PyResult<Vec<DocumentId>> {
    let points: PyReadonlyArray1<'_, u32> = units(array, "uint32")?;
    let ids = points.as_slice()?.chunks_exact(width / 4).map(|id| {
        let points = unpadded(id).iter().map(|point| char::from_u32(*point));
        match points.clone().collect::<Option<String>>() {
            Some(text) => Ok(text.into()),
            None => {
                let shown: String = points
                    .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
                    .collect();
                Err(invalid(
                    array.py(),
                    format!("id {shown:?}: not valid Unicode"),
                ))
            }
        }
    });
    ids.collect()
}

/// What is shorter than others is filled up with zeros.
fn unpadded<T: Copy + Default + PartialEq>(id: &[T]) -> &[T] {
    let end = id.iter().rposition(|unit| *unit != T::default());
    id.get(..end.map_or(0, |at| at + 1)).unwrap_or(id)
}

fn numbers<'py, T: Element>(
    array: &Bound<'py, PyUntypedArray>,
    dtype: &str,
) -> PyResult<PyReadonlyArray1<'py, T>> {
    let numbers = contiguous(array, dtype)?;
    Ok(numbers.cast::<PyArray1<T>>()?.readonly())
}

/// The text of an array, one after the other, in the byte order of this machine.
fn units<'py, T: Element>(
    array: &Bound<'py, PyUntypedArray>,
    dtype: &str,
) -> PyResult<PyReadonlyArray1<'py, T>> {
    let native = array.dtype().call_method1("newbyteorder", ("=",))?;
    let units = contiguous(array, &native)?.call_method1("view", (dtype,))?;
    Ok(units.cast::<PyArray1<T>>()?.readonly())
}
