//! Document ids: `str` or `int` in Python.

use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use polyprag_core::{DocumentId, IdBatch, IdType};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString};

use crate::errors::invalid;
use crate::id_arrays;

pub fn to_python<'py>(py: Python<'py>, id: &DocumentId) -> PyResult<Bound<'py, PyAny>> {
    match id {
        DocumentId::String(id) => id.into_bound_py_any(py),
        DocumentId::U64(id) => id.into_bound_py_any(py),
    }
}

/// An id of either type. Anything with `__index__` is an integer, except a bool.
pub fn from_python(id: &Bound<'_, PyAny>) -> PyResult<DocumentId> {
    let py = id.py();
    if let Ok(text) = id.cast::<PyString>() {
        return match text.to_str() {
            Ok(text) => Ok(DocumentId::String(text.to_owned())),
            Err(_) => Err(invalid(py, format!("id {}: not valid Unicode", shown(id)))),
        };
    }
    let is_bool =
        id.is_instance_of::<PyBool>() || id.get_type().name().is_ok_and(|name| name == "bool_");
    match id.extract::<u64>() {
        Ok(number) if !is_bool => Ok(DocumentId::U64(number)),
        _ => Err(invalid(
            py,
            format!(
                "id {}: expected a str, or an int from 0 to 2**64 - 1",
                shown(id)
            ),
        )),
    }
}

/// An id of the type that a store has.
pub fn of_type(id: &Bound<'_, PyAny>, expected: IdType) -> PyResult<DocumentId> {
    let found = from_python(id)?;
    expect_type(id.py(), &found, expected)?;
    Ok(found)
}

fn expect_type(py: Python<'_>, found: &DocumentId, expected: IdType) -> PyResult<()> {
    if found.kind() == expected {
        return Ok(());
    }
    let message = match expected {
        IdType::String => {
            format!("id {found}: the ids of this store are strings (id_type \"string\")")
        }
        IdType::U64 => format!("id {found}: the ids of this store are integers (id_type \"u64\")"),
    };
    Err(invalid(py, message))
}

/// Ids in any iterable; a lone str is not a list of its characters.
pub fn many(ids: &Bound<'_, PyAny>, expected: IdType) -> PyResult<Vec<DocumentId>> {
    Ok(match batch(ids, expected)? {
        Batch::Any(ids) => ids,
        Batch::U64(ids) => ids
            .as_slice()?
            .iter()
            .copied()
            .map(DocumentId::U64)
            .collect(),
    })
}

/// The ids of one call: those of an array of integers as they lie in memory.
#[derive(Debug)]
pub enum Batch<'py> {
    Any(Vec<DocumentId>),
    U64(PyReadonlyArray1<'py, u64>),
}

impl Batch<'_> {
    pub fn core(&self) -> PyResult<IdBatch<'_>> {
        Ok(match self {
            Batch::Any(ids) => IdBatch::Any(ids),
            Batch::U64(ids) => IdBatch::U64(ids.as_slice()?),
        })
    }
}

/// As [`many`]; no Python object is made for an id of a numpy array.
pub fn batch<'py>(ids: &Bound<'py, PyAny>, expected: IdType) -> PyResult<Batch<'py>> {
    let py = ids.py();
    if let Ok(array) = ids.cast::<PyUntypedArray>()
        && array.ndim() == 1
        && let Some(batch) = id_arrays::read(array)?
    {
        let first = match &batch {
            Batch::Any(ids) => ids.first().cloned(),
            Batch::U64(ids) => ids.as_slice()?.first().map(|id| DocumentId::U64(*id)),
        };
        // All of an array are of one type.
        first.map_or(Ok(()), |id| expect_type(py, &id, expected))?;
        return Ok(batch);
    }
    let iterator = match ids.cast::<PyString>() {
        Ok(_) => None,
        Err(_) => ids.try_iter().ok(),
    };
    match iterator {
        Some(iterator) => {
            let ids = iterator.map(|id| of_type(&id?, expected));
            Ok(Batch::Any(ids.collect::<PyResult<_>>()?))
        }
        None => Err(invalid(
            py,
            format!(
                "ids: expected a sequence of ids, got {}: put it in a list",
                shown(ids)
            ),
        )),
    }
}

/// A short repr for messages.
pub fn shown(value: &Bound<'_, PyAny>) -> String {
    let repr = match value.repr() {
        Ok(repr) => repr.to_string_lossy().into_owned(),
        Err(_) => value.get_type().to_string(),
    };
    shortened(&repr, 60)
}

pub fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or(text)),
        None => text.to_owned(),
    }
}

/// A number that counts something.
pub fn count(what: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    match value.extract::<usize>() {
        Ok(number) if !value.is_instance_of::<PyBool>() => Ok(number),
        _ => Err(invalid(
            value.py(),
            format!("{what}: expected an int of 0 or more, got {}", shown(value)),
        )),
    }
}
