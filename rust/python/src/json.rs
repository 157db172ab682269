//! JSON objects cross as text, through Python's own `json`.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyString};
use serde_json::{Map, Value};

use crate::errors::invalid;

/// The text of a mapping; what JSON cannot say is refused.
pub fn to_text(what: &str, mapping: &Bound<'_, PyAny>) -> PyResult<String> {
    let py = mapping.py();
    let dump = || {
        let object = PyDict::new(py);
        object.update(mapping.cast::<PyMapping>()?)?;
        let options = PyDict::new(py);
        options.set_item("ensure_ascii", false)?;
        options.set_item("allow_nan", false)?;
        options.set_item("separators", (",", ":"))?;
        let text = py
            .import("json")?
            .call_method("dumps", (object,), Some(&options))?;
        Ok(text.cast_into::<PyString>()?.to_str()?.to_owned())
    };
    dump().map_err(|cause| {
        let error = invalid(
            py,
            format!("{what}: expected a mapping that JSON can hold: {cause}"),
        );
        error.set_cause(py, Some(cause));
        error
    })
}

/// A fresh Python object from its text.
pub fn from_text<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (text,))
}

pub fn to_map(what: &str, mapping: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    let text = to_text(what, mapping)?;
    if let Some(number) = long_integer(&text) {
        return Err(invalid(
            mapping.py(),
            format!("{what}: {number} has more than 64 bits: give it as text"),
        ));
    }
    serde_json::from_str(&text).map_err(|error| invalid(mapping.py(), format!("{what}: {error}")))
}

/// The first integer in the text of a JSON object that would come back as a float.
fn long_integer(text: &str) -> Option<&str> {
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| matches!(c, '"' | '-' | '0'..='9')) {
        let (_, from) = rest.split_at(at);
        let end = match from.strip_prefix('"') {
            Some(inside) => 1 + end_of_string(inside),
            None => from.find([',', ']', '}']).unwrap_or(from.len()),
        };
        let (word, after) = from.split_at(end);
        let digits = word.strip_prefix('-').unwrap_or(word);
        let is_integer = digits.bytes().all(|b| b.is_ascii_digit());
        if is_integer && word.parse::<i64>().is_err() && word.parse::<u64>().is_err() {
            return Some(word);
        }
        rest = after;
    }
    None
}

/// Where what follows a string's first quotation mark goes on after its last.
fn end_of_string(inside: &str) -> usize {
    let mut escaped = false;
    let last = inside.bytes().position(|b| {
        let ends = b == b'"' && !escaped;
        escaped = b == b'\\' && !escaped;
        ends
    });
    last.map_or(inside.len(), |at| at + 1)
}

pub fn from_map<'py>(py: Python<'py>, map: &Map<String, Value>) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(map).map_err(|error| invalid(py, error.to_string()))?;
    from_text(py, &text)
}
