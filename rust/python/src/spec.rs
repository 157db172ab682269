use std::sync::Arc;

use polyprag_core::bm25::{AnalyserSpec, UNICODE_V1};
use polyprag_core::{CodecName, FilterField, FilterKind, IdType, Mixing, Phi, Rule};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};

use crate::errors::{OrRaise, invalid};
use crate::{ids, json};

/// A choice of words: the value that a word names, or an error that lists the words.
fn choose<T: Copy>(py: Python<'_>, what: &str, word: &str, choices: &[(&str, T)]) -> PyResult<T> {
    match choices.iter().find(|(name, _)| *name == word) {
        Some((_, value)) => Ok(*value),
        None => {
            let names: Vec<String> = choices
                .iter()
                .map(|(name, _)| format!("{name:?}"))
                .collect();
            Err(invalid(
                py,
                format!("{what}: expected {}, got {word:?}", names.join(" or ")),
            ))
        }
    }
}

fn name_of<T: PartialEq>(value: T, choices: &[(&'static str, T)]) -> &'static str {
    choices
        .iter()
        .find(|(_, v)| *v == value)
        .map_or("", |(name, _)| name)
}

const RULES: [(&str, Rule); 4] = [
    ("mean", Rule::Mean),
    ("score", Rule::Score),
    ("first", Rule::First),
    ("sum", Rule::Sum),
];
const PHIS: [(&str, Phi); 3] = [
    ("sigmoid", Phi::Sigmoid),
    ("softmax", Phi::Softmax),
    ("linear", Phi::Linear),
];
const MIXINGS: [(&str, Mixing); 2] = [("exact", Mixing::Exact), ("factors", Mixing::Factors)];
const ID_TYPES: [(&str, IdType); 2] = [("string", IdType::String), ("u64", IdType::U64)];

const FILTER_KINDS: [(&str, FilterKind); 4] = [
    ("string", FilterKind::String),
    ("i64", FilterKind::I64),
    ("f64", FilterKind::F64),
    ("bool", FilterKind::Bool),
];

/// From a mapping of names to kinds.
fn filter_fields(filters: &Bound<'_, PyAny>) -> PyResult<Vec<FilterField>> {
    let py = filters.py();
    let expected = |found: &Bound<'_, PyAny>| {
        let shown = ids::shown(found);
        let message = format!("filters: expected a mapping of names to kinds, got {shown}");
        invalid(py, message)
    };
    let mapping = filters.cast::<PyMapping>().map_err(|_| expected(filters))?;
    let fields = mapping.items()?.into_iter().map(|item| {
        let (name, kind): (String, String) = item.extract().map_err(|_| expected(&item))?;
        let kind = choose(py, &format!("filters[{name:?}]"), &kind, &FILTER_KINDS)?;
        Ok(FilterField::new(name, kind))
    });
    fields.collect()
}

/// A number that fits the format.
fn number(what: &str, value: &Bound<'_, PyAny>) -> PyResult<u32> {
    let found = ids::count(what, value)?;
    u32::try_from(found).map_err(|_| {
        invalid(
            value.py(),
            format!("{what}: {found} is more than 2**32 - 1"),
        )
    })
}

/// One adapted linear layer of the base model and the route group that it belongs to.
#[pyclass(frozen, eq, hash, module = "polyprag._polyprag")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Module {
    #[pyo3(get)]
    name: String,
    #[pyo3(get)]
    in_features: u32,
    #[pyo3(get)]
    out_features: u32,
    #[pyo3(get)]
    group: u32,
}

#[pymethods]
impl Module {
    #[new]
    fn new(
        name: String,
        in_features: &Bound<'_, PyAny>,
        out_features: &Bound<'_, PyAny>,
        group: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        Ok(Self {
            name,
            in_features: number("in_features", in_features)?,
            out_features: number("out_features", out_features)?,
            group: number("group", group)?,
        })
    }

    fn __repr__(&self) -> String {
        let Self {
            name,
            in_features,
            out_features,
            group,
        } = self;
        format!("Module({name:?}, {in_features}, {out_features}, {group})")
    }

    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> (Bound<'py, pyo3::types::PyType>, (String, u32, u32, u32)) {
        let m = slf.get();
        (
            slf.get_type(),
            (m.name.clone(), m.in_features, m.out_features, m.group),
        )
    }
}

/// How the routes of several documents become one.
#[pyclass(frozen, eq, module = "polyprag._polyprag")]
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Combination {
    core: polyprag_core::Combination,
}

#[pymethods]
impl Combination {
    #[new]
    #[pyo3(signature = (k=None, rule="mean", temperature=1.0), text_signature = "(k=1, rule='mean', temperature=1.0)")]
    fn new(
        py: Python<'_>,
        k: Option<&Bound<'_, PyAny>>,
        rule: &str,
        temperature: f64,
    ) -> PyResult<Self> {
        let core = polyprag_core::Combination {
            k: k.map_or(Ok(1), |k| number("k", k))?,
            rule: choose(py, "rule", rule, &RULES)?,
            temperature,
        };
        Ok(Self { core })
    }

    #[getter]
    fn k(&self) -> u32 {
        self.core.k
    }

    #[getter]
    fn rule(&self) -> &'static str {
        name_of(self.core.rule, &RULES)
    }

    #[getter]
    fn temperature(&self) -> f64 {
        self.core.temperature
    }

    fn __repr__(&self) -> String {
        format!(
            "Combination(k={}, rule='{}', temperature={})",
            self.k(),
            self.rule(),
            self.temperature()
        )
    }

    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> (Bound<'py, pyo3::types::PyType>, (u32, &'static str, f64)) {
        let c = slf.get();
        (slf.get_type(), (c.k(), c.rule(), c.temperature()))
    }
}

/// What is fixed when a store is created.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug, Clone)]
pub struct StoreSpec {
    pub core: Arc<polyprag_core::StoreSpec>,
}

#[pymethods]
impl StoreSpec {
    #[new]
    #[pyo3(
        signature = (
            *, modules, experts, rank, alpha, codec, phi="sigmoid", top_k=None, mixing="exact",
            combination=None, id_type="string", keep_title=true, keep_text=true, keep_metadata=true,
            stemmer=None, filters=None, base_model=None, recipe=None
        ),
        text_signature = "(*, modules, experts, rank, alpha, codec, phi='sigmoid', top_k=None, \
            mixing='exact', combination=..., id_type='string', keep_title=True, keep_text=True, \
            keep_metadata=True, stemmer=None, filters=..., base_model=..., recipe=...)"
    )]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        modules: &Bound<'_, PyAny>,
        experts: &Bound<'_, PyAny>,
        rank: &Bound<'_, PyAny>,
        alpha: f64,
        codec: &str,
        phi: &str,
        top_k: Option<&Bound<'_, PyAny>>,
        mixing: &str,
        combination: Option<&Bound<'_, Combination>>,
        id_type: &str,
        keep_title: bool,
        keep_text: bool,
        keep_metadata: bool,
        stemmer: Option<String>,
        filters: Option<&Bound<'_, PyAny>>,
        base_model: Option<&Bound<'_, PyAny>>,
        recipe: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let modules = modules.try_iter()?.map(|module| {
            let module = module?;
            let Module {
                name,
                in_features,
                out_features,
                group,
            } = module.cast::<Module>()?.get().clone();
            Ok(polyprag_core::Module {
                name,
                in_features,
                out_features,
                group,
            })
        });
        let map = |what, value: Option<&Bound<'_, PyAny>>| {
            value.map_or(Ok(Default::default()), |value| json::to_map(what, value))
        };
        let core = polyprag_core::StoreSpec {
            modules: modules.collect::<PyResult<_>>()?,
            experts: number("experts", experts)?,
            rank: number("rank", rank)?,
            alpha,
            codec: codec.parse::<CodecName>().or_raise(py)?,
            phi: choose(py, "phi", phi, &PHIS)?,
            top_k: top_k.map(|k| number("top_k", k)).transpose()?,
            mixing: choose(py, "mixing", mixing, &MIXINGS)?,
            combination: combination
                .map(|c| c.get().core.clone())
                .unwrap_or_default(),
            id_type: choose(py, "id_type", id_type, &ID_TYPES)?,
            keep_title,
            keep_text,
            keep_metadata,
            analyser: AnalyserSpec {
                name: UNICODE_V1.to_owned(),
                stemmer,
            },
            filters: filters.map_or(Ok(Vec::new()), filter_fields)?,
            base_model: map("base_model", base_model)?,
            recipe: map("recipe", recipe)?,
        };
        core.validate().or_raise(py)?;
        Ok(Self {
            core: Arc::new(core),
        })
    }

    #[getter]
    fn modules(&self) -> Vec<Module> {
        let module = |m: &polyprag_core::Module| Module {
            name: m.name.clone(),
            in_features: m.in_features,
            out_features: m.out_features,
            group: m.group,
        };
        self.core.modules.iter().map(module).collect()
    }

    /// The number of route groups.
    #[getter]
    fn groups(&self) -> usize {
        self.core.groups()
    }

    #[getter]
    fn experts(&self) -> u32 {
        self.core.experts
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.core.rank
    }

    #[getter]
    fn alpha(&self) -> f64 {
        self.core.alpha
    }

    #[getter]
    fn codec(&self) -> String {
        self.core.codec.to_string()
    }

    #[getter]
    fn phi(&self) -> &'static str {
        name_of(self.core.phi, &PHIS)
    }

    #[getter]
    fn top_k(&self) -> Option<u32> {
        self.core.top_k
    }

    #[getter]
    fn mixing(&self) -> &'static str {
        name_of(self.core.mixing, &MIXINGS)
    }

    #[getter]
    fn combination(&self) -> Combination {
        Combination {
            core: self.core.combination.clone(),
        }
    }

    #[getter]
    fn id_type(&self) -> &'static str {
        name_of(self.core.id_type, &ID_TYPES)
    }

    #[getter]
    fn keep_title(&self) -> bool {
        self.core.keep_title
    }

    #[getter]
    fn keep_text(&self) -> bool {
        self.core.keep_text
    }

    #[getter]
    fn keep_metadata(&self) -> bool {
        self.core.keep_metadata
    }

    #[getter]
    fn stemmer(&self) -> Option<&str> {
        self.core.analyser.stemmer.as_deref()
    }

    /// The name and version of the analyser.
    #[getter]
    fn analyser(&self) -> &str {
        &self.core.analyser.name
    }

    /// Keys of the metadata on which a search can be filtered, with their kinds.
    #[getter]
    fn filters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let filters = PyDict::new(py);
        for field in &self.core.filters {
            filters.set_item(&field.name, name_of(field.kind, &FILTER_KINDS))?;
        }
        Ok(filters)
    }

    #[getter]
    fn base_model<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::from_map(py, &self.core.base_model)
    }

    #[getter]
    fn recipe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json::from_map(py, &self.core.recipe)
    }

    fn __repr__(&self) -> String {
        let c = &self.core;
        format!(
            "StoreSpec(modules=<{}>, groups={}, experts={}, rank={}, alpha={}, codec='{}', phi='{}', id_type='{}')",
            c.modules.len(),
            c.groups(),
            c.experts,
            c.rank,
            c.alpha,
            c.codec,
            self.phi(),
            self.id_type()
        )
    }
}
