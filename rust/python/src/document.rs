use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::prelude::*;
use pyo3::types::PyString;
use serde_json::Value;

use crate::errors::invalid;
use crate::{ids, json};

/// One retrievable passage. Immutable, comparable, picklable.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct Document {
    pub core: polyprag_core::Document,
}

fn text_of(what: &str, value: Option<Bound<'_, PyString>>) -> PyResult<Option<String>> {
    value
        .map(|value| match value.to_str() {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(invalid(
                value.py(),
                format!("{what}: not valid Unicode (a lone surrogate)"),
            )),
        })
        .transpose()
}

#[pymethods]
impl Document {
    #[new]
    #[pyo3(signature = (id, text=None, title=None, metadata=None))]
    fn new(
        id: &Bound<'_, PyAny>,
        text: Option<Bound<'_, PyString>>,
        title: Option<Bound<'_, PyString>>,
        metadata: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let core = polyprag_core::Document {
            id: ids::from_python(id)?,
            title: text_of("title", title)?,
            text: text_of("text", text)?,
            metadata: metadata.map(|m| json::to_text("metadata", m)).transpose()?,
        };
        Ok(Self { core })
    }

    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        ids::to_python(py, &self.core.id)
    }

    #[getter]
    fn title(&self) -> Option<&str> {
        self.core.title.as_deref()
    }

    #[getter]
    fn text(&self) -> Option<&str> {
        self.core.text.as_deref()
    }

    /// A fresh dict at every access.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let text = self.core.metadata.as_deref();
        text.map(|text| json::from_text(py, text)).transpose()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        let Ok(other) = other.cast::<Self>() else {
            return false;
        };
        let (a, b) = (&self.core, &other.get().core);
        a.id == b.id
            && a.title == b.title
            && a.text == b.text
            && same_json(&a.metadata, &b.metadata)
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.core.id, &self.core.title, &self.core.text).hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let mut shown = format!("Document({}", ids::to_python(py, &self.core.id)?.repr()?);
        for (name, value) in [("text", &self.core.text), ("title", &self.core.title)] {
            if let Some(value) = value {
                let short = PyString::new(py, &ids::shortened(value, 60));
                shown += &format!(", {name}={}", short.repr()?);
            }
        }
        if let Some(text) = &self.core.metadata {
            shown += &format!(", metadata={}", ids::shortened(text, 60));
        }
        Ok(shown + ")")
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Reduced<'py>)> {
        let (py, this) = (slf.py(), slf.get());
        let arguments = (
            this.id(py)?,
            this.core.text.clone(),
            this.core.title.clone(),
            this.metadata(py)?,
        );
        Ok((slf.get_type().into_any(), arguments))
    }
}

type Reduced<'py> = (
    Bound<'py, PyAny>,
    Option<String>,
    Option<String>,
    Option<Bound<'py, PyAny>>,
);

/// Equal as objects, whatever the order of their keys.
fn same_json(a: &Option<String>, b: &Option<String>) -> bool {
    let read = |text: &Option<String>| {
        text.as_deref()
            .and_then(|t| serde_json::from_str::<Value>(t).ok())
    };
    a == b || (a.is_some() && b.is_some() && read(a) == read(b))
}
