use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// Bytes of one role in a generation.
#[pyclass(frozen, get_all, module = "polyprag._polyprag")]
#[derive(Debug, Clone)]
pub struct PartInfo {
    role: String,
    files: u64,
    bytes: u64,
    bytes_per_document: f64,
}

#[pymethods]
impl PartInfo {
    fn __repr__(&self) -> String {
        format!(
            "PartInfo(role='{}', files={}, bytes={}, bytes_per_document={:.1})",
            self.role, self.files, self.bytes, self.bytes_per_document
        )
    }
}

/// The footprint of one generation, in all and a document.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct StoreInfo {
    core: polyprag_core::StoreInfo,
}

impl From<polyprag_core::StoreInfo> for StoreInfo {
    fn from(core: polyprag_core::StoreInfo) -> Self {
        Self { core }
    }
}

#[pymethods]
impl StoreInfo {
    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(self.core.path.as_os_str().into_pyobject(py)?.into_any())
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.core.generation
    }

    #[getter]
    fn documents(&self) -> u64 {
        self.core.documents
    }

    #[getter]
    fn unrouted(&self) -> u64 {
        self.core.unrouted
    }

    #[getter]
    fn total_bytes(&self) -> u64 {
        self.core.total_bytes
    }

    #[getter]
    fn bytes_per_document(&self) -> f64 {
        self.core.bytes_per_document
    }

    #[getter]
    fn route_bytes_per_document(&self) -> f64 {
        self.core.route_bytes_per_document
    }

    /// What one LoRA a document of the same rank and modules would take, in the dtype of the experts.
    #[getter]
    fn lora_bytes_per_document(&self) -> u64 {
        self.core.lora_bytes_per_document
    }

    #[getter]
    fn parts(&self) -> Vec<PartInfo> {
        let part = |part: &polyprag_core::PartInfo| PartInfo {
            role: part.role.clone(),
            files: part.files,
            bytes: part.bytes,
            bytes_per_document: part.bytes_per_document,
        };
        self.core.parts.iter().map(part).collect()
    }

    /// Plain values, ready for JSON.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let parts = PyList::empty(py);
        for part in &self.core.parts {
            let dict = PyDict::new(py);
            dict.set_item("role", &part.role)?;
            dict.set_item("files", part.files)?;
            dict.set_item("bytes", part.bytes)?;
            dict.set_item("bytes_per_document", part.bytes_per_document)?;
            parts.append(dict)?;
        }
        let dict = PyDict::new(py);
        dict.set_item("path", self.path(py)?)?;
        dict.set_item("generation", self.core.generation)?;
        dict.set_item("documents", self.core.documents)?;
        dict.set_item("unrouted", self.core.unrouted)?;
        dict.set_item("total_bytes", self.core.total_bytes)?;
        dict.set_item("bytes_per_document", self.core.bytes_per_document)?;
        dict.set_item(
            "route_bytes_per_document",
            self.core.route_bytes_per_document,
        )?;
        dict.set_item("lora_bytes_per_document", self.core.lora_bytes_per_document)?;
        dict.set_item("parts", parts)?;
        Ok(dict)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!(
            "StoreInfo(path={}, generation={}, documents={}, total_bytes={}, route_bytes_per_document={:.1})",
            self.path(py)?.repr()?,
            self.core.generation,
            self.core.documents,
            self.core.total_bytes,
            self.core.route_bytes_per_document
        ))
    }
}

/// What `Store.verify` read and found whole.
#[pyclass(frozen, get_all, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct VerifyReport {
    files: u64,
    bytes: u64,
    documents: u64,
}

impl From<polyprag_core::VerifyReport> for VerifyReport {
    fn from(report: polyprag_core::VerifyReport) -> Self {
        Self {
            files: report.files,
            bytes: report.bytes,
            documents: report.documents,
        }
    }
}

#[pymethods]
impl VerifyReport {
    fn __repr__(&self) -> String {
        format!(
            "VerifyReport(files={}, bytes={}, documents={})",
            self.files, self.bytes, self.documents
        )
    }
}
