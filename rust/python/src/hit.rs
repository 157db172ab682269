use polyprag_core::DocumentId;
use pyo3::prelude::*;

use crate::ids;

/// One document that BM25 found, best first in the list it comes in.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct Hit {
    id: DocumentId,
    /// Its BM25 score.
    #[pyo3(get)]
    score: f32,
    /// The permanent number of this version of the document.
    #[pyo3(get)]
    docno: u64,
}

impl From<polyprag_core::Hit> for Hit {
    fn from(hit: polyprag_core::Hit) -> Self {
        Self {
            id: hit.id,
            score: hit.score,
            docno: hit.docno,
        }
    }
}

#[pymethods]
impl Hit {
    #[getter]
    fn id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        ids::to_python(py, &self.id)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let id = self.id(py)?.repr()?;
        Ok(format!(
            "Hit(id={id}, score={:.4}, docno={})",
            self.score, self.docno
        ))
    }
}
