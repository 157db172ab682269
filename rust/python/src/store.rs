use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::ndarray::IxDyn;
use numpy::{PyArray1, PyArrayDyn, PyArrayMethods};
use polyprag_core::{CodecName, DocumentId, Dtype, Error, Filter, Kind, Recoding};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyType};

use crate::arrays;
use crate::decoder::GivenDecoder;
use crate::document::Document;
use crate::errors::{OrRaise, invalid};
use crate::hit::Hit;
use crate::ids::{self, count};
use crate::info::{StoreInfo, VerifyReport};
use crate::json;
use crate::spec::StoreSpec;
use crate::watch::Asking;
use crate::writer::Writer;

/// One generation of a store, open for reading. Safe to share between threads.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct Store {
    pub core: polyprag_core::Store,
}

impl Store {
    fn many(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<DocumentId>> {
        let id_type = self.core.spec().or_raise(py)?.id_type;
        ids::many(ids, id_type)
    }

    /// Long work, detached, of which `progress` is told.
    fn watched<T: Send>(
        &self,
        py: Python<'_>,
        progress: Option<&Bound<'_, PyAny>>,
        work: impl FnOnce(&polyprag_core::Store) -> polyprag_core::Result<T> + Send,
    ) -> PyResult<T> {
        let asking = Asking::new(progress)?;
        let core = self.core.watched(asking.clone());
        let done = py.detach(|| work(&core));
        asking.outcome(py, done)
    }
}

#[pymethods]
impl Store {
    /// With `expect_digest`, only if the generation in force has that digest.
    #[staticmethod]
    #[pyo3(signature = (path, *, expect_digest=None))]
    fn open(py: Python<'_>, path: PathBuf, expect_digest: Option<&str>) -> PyResult<Self> {
        let opened = py.detach(|| match expect_digest {
            Some(digest) => polyprag_core::Store::open_expecting(path, digest),
            None => polyprag_core::Store::open(path),
        });
        let core = opened.or_raise(py)?;
        Ok(Self { core })
    }

    /// Make a new store at `path` of a file that `pack` wrote.
    #[staticmethod]
    #[pyo3(signature = (file, path, *, progress=None))]
    fn unpack(
        py: Python<'_>,
        file: PathBuf,
        path: PathBuf,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let asking = Asking::new(progress)?;
        let watch = asking.clone();
        let unpacked = py.detach(|| polyprag_core::Store::unpack_watched(file, path, watch));
        asking.outcome(py, unpacked)
    }

    /// A writer for a new store; nothing is visible at `path` before its first commit.
    #[staticmethod]
    #[pyo3(signature = (path, spec, experts, decoder=None, *, router=None, expert_dtype=None))]
    fn create(
        py: Python<'_>,
        path: PathBuf,
        spec: &Bound<'_, StoreSpec>,
        experts: &Bound<'_, PyAny>,
        decoder: Option<&Bound<'_, PyAny>>,
        router: Option<&Bound<'_, PyAny>>,
        expert_dtype: Option<&str>,
    ) -> PyResult<Writer> {
        let dtype: Option<Dtype> = expert_dtype.map(str::parse).transpose().or_raise(py)?;
        let experts = arrays::named("experts", experts, arrays::given)?;
        let experts = arrays::tensors(&experts);
        let router = router.map(|router| arrays::named("router", router, arrays::given_float32));
        let router = router.transpose()?;
        let router = router.as_deref().map(arrays::tensors);
        let decoder = decoder.map(GivenDecoder::new).transpose()?;
        let decoder = decoder.as_ref().map(GivenDecoder::core).transpose()?;
        let spec = polyprag_core::StoreSpec::clone(&spec.get().core);
        let create = || {
            let decoder = decoder.as_ref();
            let mut writer = polyprag_core::Store::create(path, spec, &experts, decoder, dtype)?;
            if let Some(router) = &router {
                writer.keep_router(router)?;
            }
            Ok(writer)
        };
        let core = py.detach(create).or_raise(py)?;
        Ok(Writer::new(core))
    }

    /// The one writer of this store, on top of its newest generation.
    fn writer(&self, py: Python<'_>) -> PyResult<Writer> {
        let core = py.detach(|| self.core.writer()).or_raise(py)?;
        Ok(Writer::new(core))
    }

    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(self.core.path().as_os_str().into_pyobject(py)?.into_any())
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.core.generation().or_raise(py)
    }

    #[getter]
    fn spec(&self, py: Python<'_>) -> PyResult<StoreSpec> {
        let core = self.core.spec().or_raise(py)?;
        Ok(StoreSpec { core })
    }

    /// Read-only: views into the mapped file, which they keep alive, or float32 decoded at this call.
    #[getter]
    fn experts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let experts = PyDict::new(py);
        for tensor in self.core.experts().or_raise(py)? {
            let name = tensor.raw.name.clone();
            experts.set_item(name, arrays::expert(py, tensor)?)?;
        }
        Ok(experts)
    }

    #[getter]
    fn expert_dtype(&self, py: Python<'_>) -> PyResult<&'static str> {
        Ok(self.core.expert_dtype().or_raise(py)?.name())
    }

    /// V and b as read-only views, if the codec keeps codes.
    #[getter]
    fn decoder<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>> {
        match self.core.decoder().or_raise(py)? {
            Some((v, b)) => Ok(Some((arrays::view(py, v)?, arrays::view(py, b)?))),
            None => Ok(None),
        }
    }

    /// The amortised router by name as read-only views, if the store has one.
    #[getter]
    fn router<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(views) = self.core.router().or_raise(py)? else {
            return Ok(None);
        };
        let router = PyDict::new(py);
        for view in views {
            let name = view.name.clone();
            router.set_item(name, arrays::view(py, view)?)?;
        }
        Ok(Some(router))
    }

    /// The best `k` documents for a text that pass the filter, best first. Any text is a question; one
    /// without a word finds nothing.
    #[pyo3(
        signature = (text, k=None, filter=None),
        text_signature = "($self, text, k=10, filter=None)"
    )]
    fn search(
        &self,
        py: Python<'_>,
        text: Bound<'_, PyString>,
        k: Option<&Bound<'_, PyAny>>,
        filter: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Hit>> {
        let k = k.map_or(Ok(DEFAULT_K), |k| count("k", k))?;
        let filter = filter.map(read_filter).transpose()?;
        let text = text.to_string_lossy().into_owned();
        let hits = py
            .detach(|| self.core.search(&text, k, filter.as_ref()))
            .or_raise(py)?;
        Ok(hits.into_iter().map(Hit::from).collect())
    }

    /// As `search` for each text, all in one generation, on all processors.
    #[pyo3(
        signature = (texts, k=None, filter=None, *, progress=None),
        text_signature = "($self, texts, k=10, filter=None, *, progress=None)"
    )]
    fn search_many(
        &self,
        py: Python<'_>,
        texts: Vec<Bound<'_, PyString>>,
        k: Option<&Bound<'_, PyAny>>,
        filter: Option<&Bound<'_, PyAny>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Vec<Hit>>> {
        let k = k.map_or(Ok(DEFAULT_K), |k| count("k", k))?;
        let filter = filter.map(read_filter).transpose()?;
        let texts: Vec<String> = texts
            .iter()
            .map(|text| text.to_string_lossy().into_owned())
            .collect();
        let found = self.watched(py, progress, |core| {
            core.search_many(&texts, k, filter.as_ref())
        })?;
        Ok(found
            .into_iter()
            .map(|hits| hits.into_iter().map(Hit::from).collect())
            .collect())
    }

    /// [n, groups, K] for "w" and "z", [n, d] for "code".
    #[pyo3(signature = (ids, kind="w"))]
    fn routes<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        kind: &str,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let kind = match kind {
            "w" => Kind::Weights,
            "z" => Kind::Logits,
            "code" => Kind::Code,
            other => {
                return Err(invalid(
                    py,
                    format!("kind: expected \"w\", \"z\" or \"code\", got {other:?}"),
                ));
            }
        };
        let ids = self.many(py, ids)?;
        let routes = py.detach(|| self.core.routes(&ids, kind)).or_raise(py)?;
        arrays::fresh(py, routes)
    }

    /// The records as the codec keeps them, uint8 of shape [n, width].
    fn records<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArrayDyn<u8>>> {
        let ids = self.many(py, ids)?;
        let (bytes, width) = py.detach(|| self.core.records(&ids)).or_raise(py)?;
        PyArray1::from_vec(py, bytes).reshape(IxDyn(&[ids.len(), width]))
    }

    /// sum_d weights[d] * w_d, of shape [groups, K]; equal weights (1/n) when None.
    #[pyo3(signature = (ids, weights=None))]
    fn combined_route<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        weights: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let ids = self.many(py, ids)?;
        let weights: Option<Vec<f64>> = weights
            .map(|weights| {
                weights.extract().map_err(|_| {
                    invalid(
                        py,
                        format!(
                            "weights: expected a sequence of numbers, got {}",
                            ids::shown(weights)
                        ),
                    )
                })
            })
            .transpose()?;
        let route = py
            .detach(|| self.core.combined_route(&ids, weights.as_deref()))
            .or_raise(py)?;
        arrays::fresh(py, route)
    }

    /// The documents with what the store keeps of them.
    fn documents(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<Document>> {
        let ids = self.many(py, ids)?;
        let documents = py.detach(|| self.core.documents(&ids)).or_raise(py)?;
        Ok(documents
            .into_iter()
            .map(|core| Document { core })
            .collect())
    }

    fn is_routed(&self, py: Python<'_>, id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let id = ids::of_type(id, self.core.spec().or_raise(py)?.id_type)?;
        py.detach(|| self.core.is_routed(&id)).or_raise(py)
    }

    fn info(&self, py: Python<'_>) -> PyResult<StoreInfo> {
        Ok(py.detach(|| self.core.info()).or_raise(py)?.into())
    }

    /// Reads everything and compares it with every checksum.
    #[pyo3(signature = (*, progress=None))]
    fn verify(
        &self,
        py: Python<'_>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<VerifyReport> {
        let report = self.watched(py, progress, |core| core.verify())?;
        Ok(report.into())
    }

    /// What this generation is, as 64 hexadecimal digits. Copies have the digest of their source.
    fn digest(&self, py: Python<'_>) -> PyResult<String> {
        self.core.digest().or_raise(py)
    }

    /// Copy this generation, and nothing of others, to a new store at `path`.
    #[pyo3(signature = (path, *, progress=None))]
    fn snapshot(
        &self,
        py: Python<'_>,
        path: PathBuf,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.watched(py, progress, |core| core.snapshot(path))
    }

    /// Write this generation into one new file at `path`.
    #[pyo3(signature = (path, *, progress=None))]
    fn pack(
        &self,
        py: Python<'_>,
        path: PathBuf,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.watched(py, progress, |core| core.pack(path))
    }

    /// Write a new store at `path` with the same documents, their routes in another codec.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (path, *, codec, decoder=None, projection=None, expert_dtype=None, progress=None))]
    fn recode(
        &self,
        py: Python<'_>,
        path: PathBuf,
        codec: &str,
        decoder: Option<&Bound<'_, PyAny>>,
        projection: Option<&Bound<'_, PyAny>>,
        expert_dtype: Option<&str>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let codec: CodecName = codec.parse().or_raise(py)?;
        let expert_dtype: Option<Dtype> = expert_dtype.map(str::parse).transpose().or_raise(py)?;
        let given = match (decoder, projection) {
            (Some(decoder), Some(projection)) => {
                let decoder = GivenDecoder::new(decoder)?;
                let projection = decoder.projection(projection)?;
                Some((decoder, projection))
            }
            (None, None) => None,
            _ => {
                return Err(invalid(
                    py,
                    "a decoder and a projection are given together, or neither",
                ));
            }
        };
        let decoder = match &given {
            Some((decoder, projection)) => Some((decoder.core()?, projection.as_slice()?)),
            None => None,
        };
        let recoding = Recoding {
            codec,
            decoder,
            expert_dtype,
        };
        self.watched(py, progress, |core| core.recode(path, &recoding))
    }

    /// Move on to the newest generation; True if there was one.
    fn refresh(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.core.refresh()).or_raise(py)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.core.close());
    }

    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let documents = self.core.len().or_raise(py)?;
        usize::try_from(documents).map_err(|_| {
            invalid(
                py,
                format!("{documents} documents are too many to count here"),
            )
        })
    }

    fn __contains__(&self, py: Python<'_>, id: &Bound<'_, PyAny>) -> PyResult<bool> {
        let id_type = self.core.spec().or_raise(py)?.id_type;
        match ids::of_type(id, id_type) {
            Ok(id) => py.detach(|| self.core.contains(&id)).or_raise(py),
            Err(_) => Ok(false), // nothing of another type is in it
        }
    }

    fn __iter__(&self, py: Python<'_>) -> PyResult<IdIterator> {
        let ids = self.core.ids().or_raise(py)?;
        Ok(IdIterator(Mutex::new((ids, VecDeque::new()))))
    }

    fn __enter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.get().core.generation().or_raise(slf.py())?;
        Ok(slf)
    }

    #[pyo3(signature = (exc_type, exc, traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: Option<&Bound<'_, PyType>>,
        exc: Option<&Bound<'_, PyAny>>,
        traceback: Option<&Bound<'_, PyAny>>,
    ) {
        let _ = (exc_type, exc, traceback);
        self.close(py);
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let path = self.path(py)?.repr()?;
        match (self.core.generation(), self.core.len(), self.core.spec()) {
            (Ok(generation), Ok(documents), Ok(spec)) => Ok(format!(
                "<Store {path}: generation {generation}, {documents} documents, codec {}>",
                spec.codec
            )),
            _ => Ok(format!("<Store {path}: closed>")),
        }
    }
}

const DEFAULT_K: usize = 10;

fn read_filter(filter: &Bound<'_, PyAny>) -> PyResult<Filter> {
    Filter::from_json(&json::to_text("filter", filter)?).or_raise(filter.py())
}

/// Ids a chunk at a time, so that neither the lock nor the interpreter is taken for each.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
struct IdIterator(Mutex<(polyprag_core::Ids, VecDeque<DocumentId>)>);

const IDS_AT_ONCE: usize = 1_024;

#[pymethods]
impl IdIterator {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let next = py.detach(|| -> Result<Option<DocumentId>, Error> {
            let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (ids, chunk) = &mut *guard;
            if chunk.is_empty() {
                for id in ids.take(IDS_AT_ONCE) {
                    chunk.push_back(id?);
                }
            }
            Ok(chunk.pop_front())
        });
        next.or_raise(py)?
            .map(|id| ids::to_python(py, &id))
            .transpose()
    }
}
