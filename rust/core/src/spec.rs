//! What is fixed when a store is created: modules, experts, codec, phi, and what is kept of a document.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::bm25::{Analyser, AnalyserSpec, FilterField, IndexSpec};
use crate::error::{Error, Result};
use crate::routes::{Codec, CodecName, Phi};

/// The longest name of a module and the longest id, in bytes.
pub const MAX_NAME: usize = 512;

const MAX_EXPERTS: u32 = 65_535;
const MAX_RANK: u32 = 65_535;
const MAX_MODULES: usize = 1_000_000;

/// One adapted linear layer and the route group that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    pub name: String,
    pub in_features: u32,
    pub out_features: u32,
    pub group: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    Mean,
    Score,
    First,
    Sum,
}

/// How the routes of several documents become one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Combination {
    pub k: u32,
    pub rule: Rule,
    pub temperature: f64,
}

impl Default for Combination {
    fn default() -> Self {
        Self {
            k: 1,
            rule: Rule::Mean,
            temperature: 1.0,
        }
    }
}

/// `exact`: sum of B_k A_k; `factors`: Poly's (sum of A_k, sum of B_k), kept to reproduce published work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixing {
    Exact,
    Factors,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdType {
    String,
    U64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoreSpec {
    pub modules: Vec<Module>,
    pub experts: u32,
    pub rank: u32,
    pub alpha: f64,
    pub codec: CodecName,
    pub phi: Phi,
    #[serde(default)]
    pub top_k: Option<u32>,
    pub mixing: Mixing,
    pub combination: Combination,
    pub id_type: IdType,
    pub keep_title: bool,
    pub keep_text: bool,
    pub keep_metadata: bool,
    pub analyser: AnalyserSpec,
    /// Keys of the metadata on which a search can be filtered.
    #[serde(default)]
    pub filters: Vec<FilterField>,
    /// Carried, never read: the fingerprint of the base model, and how the store was trained.
    #[serde(default)]
    pub base_model: Map<String, Value>,
    #[serde(default)]
    pub recipe: Map<String, Value>,
}

impl StoreSpec {
    /// G, the number of route groups.
    pub fn groups(&self) -> usize {
        self.modules
            .iter()
            .map(|m| m.group as usize + 1)
            .max()
            .unwrap_or(0)
    }

    /// G * K, the number of logits and weights of one document.
    pub fn logits(&self) -> usize {
        self.groups() * self.experts as usize
    }

    /// What the BM25 index is made for.
    pub fn index_spec(&self) -> IndexSpec {
        IndexSpec {
            analyser: self.analyser.clone(),
            filters: self.filters.clone(),
        }
    }

    pub fn build_codec(&self) -> Box<dyn Codec> {
        self.codec.build(self.groups(), self.experts as usize)
    }

    /// Bytes of one LoRA of this rank over all modules, `width` bytes a number.
    pub fn lora_bytes(&self, width: u64) -> u64 {
        self.modules
            .iter()
            .map(|m| u64::from(m.in_features) + u64::from(m.out_features))
            .fold(0u64, |sum, n| sum.saturating_add(n))
            .saturating_mul(u64::from(self.rank))
            .saturating_mul(width)
    }

    pub fn validate(&self) -> Result<()> {
        check((1..=MAX_MODULES).contains(&self.modules.len()), &|| {
            format!(
                "modules: expected 1 to {MAX_MODULES}, got {}",
                self.modules.len()
            )
        })?;
        check((1..=MAX_EXPERTS).contains(&self.experts), &|| {
            format!("experts: expected 1 to {MAX_EXPERTS}, got {}", self.experts)
        })?;
        check((1..=MAX_RANK).contains(&self.rank), &|| {
            format!("rank: expected 1 to {MAX_RANK}, got {}", self.rank)
        })?;
        check(self.alpha.is_finite() && self.alpha > 0.0, &|| {
            format!(
                "alpha: expected a finite number above 0, got {}",
                self.alpha
            )
        })?;
        let c = &self.combination;
        check((1..=MAX_EXPERTS).contains(&c.k), &|| {
            format!("combination.k: expected 1 to {MAX_EXPERTS}, got {}", c.k)
        })?;
        check(c.temperature.is_finite() && c.temperature > 0.0, &|| {
            format!(
                "combination.temperature: expected a finite number above 0, got {}",
                c.temperature
            )
        })?;
        if let Some(k) = self.top_k {
            check((1..=self.experts).contains(&k), &|| {
                format!("top_k: expected 1 to {} (experts), got {k}", self.experts)
            })?;
            check(self.phi.takes_top_k(), &|| {
                "top_k: the weights of phi linear have any sign, and the largest cannot stand for all".to_owned()
            })?;
        }
        if let CodecName::Sparse(k) = self.codec {
            check(self.phi != Phi::Linear, &|| {
                format!(
                    "codec {}: it keeps positive weights that sum to 1, and those of phi linear have any sign",
                    self.codec
                )
            })?;
            check(k <= self.experts, &|| {
                let (codec, experts) = (self.codec, self.experts);
                format!(
                    "codec {codec}: a group has {experts} weights (experts) and cannot keep {k}"
                )
            })?;
        }
        Analyser::new(&self.analyser)?;
        FilterField::validate_all(&self.filters)?;
        self.validate_modules()
    }

    fn validate_modules(&self) -> Result<()> {
        let mut names = HashSet::new();
        let mut groups = HashSet::new();
        for m in &self.modules {
            check((1..=MAX_NAME).contains(&m.name.len()), &|| {
                format!("module name {:?}: expected 1 to {MAX_NAME} bytes", m.name)
            })?;
            check(names.insert(m.name.as_str()), &|| {
                format!("module {:?} is listed twice", m.name)
            })?;
            check(m.in_features > 0 && m.out_features > 0, &|| {
                format!(
                    "module {:?}: in_features and out_features must be above 0",
                    m.name
                )
            })?;
            // Bytes of the larger tensor, as f32.
            let largest = u64::from(m.in_features.max(m.out_features))
                .checked_mul(u64::from(self.experts) * u64::from(self.rank) * 4);
            check(largest.is_some_and(|n| n <= isize::MAX as u64), &|| {
                format!(
                    "module {:?}: experts * rank * features is too large",
                    m.name
                )
            })?;
            groups.insert(m.group);
        }
        // Distinct numbers that are all below their count are exactly 0..count.
        let dense = groups.iter().all(|g| (*g as usize) < groups.len());
        check(dense, &|| {
            let n = groups.len();
            format!(
                "module groups: {n} different numbers must be 0 to {}, without a gap",
                n - 1
            )
        })
    }
}

fn check(ok: bool, message: &dyn Fn() -> String) -> Result<()> {
    match ok {
        true => Ok(()),
        false => Err(Error::InvalidInput(message())),
    }
}
