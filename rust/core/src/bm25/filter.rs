//! Filters: conditions on metadata fields that a store declares when it is created.
//!
//! The values of a declared field are kept beside the index, in Tantivy's fast fields. A filter is a
//! conjunction of conditions; as JSON, an object with a key for each field:
//!
//! ```json
//! {"lang": "en", "kind": ["a", "b"], "year": {"gte": 1990, "lt": 2000}}
//! ```
//!
//! A document without a value passes no condition on that field. Of several strings, one must be asked for.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};
use tantivy::columnar::Column;
use tantivy::schema::{FAST, Field, SchemaBuilder, TextOptions};
use tantivy::{DocId, SegmentReader, TantivyDocument};

use crate::documents::DocumentId;
use crate::error::{Error, Result};

pub const MAX_FILTER_FIELDS: usize = 64;
/// The longest name of a field, in bytes.
pub const MAX_FILTER_NAME: usize = 128;
/// The longest string that can be filtered on, in bytes. (Tantivy would cut one after 65,535.)
pub const MAX_FILTER_STRING: usize = 4_096;

/// Tantivy's name for the analyser that leaves a string whole.
const RAW: &str = "raw";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilterKind {
    /// A string, or an array of strings.
    String,
    I64,
    F64,
    Bool,
}

impl FilterKind {
    fn expected(self) -> &'static str {
        match self {
            FilterKind::String => "a string or an array of strings",
            FilterKind::I64 => "an integer of 64 bits",
            FilterKind::F64 => "a number",
            FilterKind::Bool => "true or false",
        }
    }
}

impl fmt::Display for FilterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FilterKind::String => "string",
            FilterKind::I64 => "i64",
            FilterKind::F64 => "f64",
            FilterKind::Bool => "bool",
        })
    }
}

/// A key of the metadata on which a search can be filtered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterField {
    pub name: String,
    pub kind: FilterKind,
}

impl FilterField {
    pub fn new(name: impl Into<String>, kind: FilterKind) -> Self {
        Self {
            name: name.into(),
            kind,
        }
    }

    pub fn validate_all(fields: &[FilterField]) -> Result<()> {
        if fields.len() > MAX_FILTER_FIELDS {
            let n = fields.len();
            return Err(Error::invalid(format!(
                "filters: {n} fields, and {MAX_FILTER_FIELDS} are the most"
            )));
        }
        for (at, field) in fields.iter().enumerate() {
            let name = &field.name;
            if !(1..=MAX_FILTER_NAME).contains(&name.len()) {
                return Err(Error::invalid(format!(
                    "filters: name {name:?}: expected 1 to {MAX_FILTER_NAME} bytes"
                )));
            }
            if fields.iter().skip(at + 1).any(|other| other.name == *name) {
                return Err(Error::invalid(format!(
                    "filters: {name:?} is declared twice"
                )));
            }
        }
        Ok(())
    }
}

/// Adds the fast fields of the declared ones, whose names are of our making.
pub(super) fn add_to_schema(builder: &mut SchemaBuilder, fields: &[FilterField]) -> Vec<Field> {
    let add = |(at, field): (usize, &FilterField)| {
        let name = column_name(at);
        match field.kind {
            FilterKind::String => {
                builder.add_text_field(&name, TextOptions::default().set_fast(RAW))
            }
            FilterKind::I64 => builder.add_i64_field(&name, FAST),
            FilterKind::F64 => builder.add_f64_field(&name, FAST),
            FilterKind::Bool => builder.add_bool_field(&name, FAST),
        }
    };
    fields.iter().enumerate().map(add).collect()
}

fn column_name(at: usize) -> String {
    format!("filter{at}")
}

/// What one document has in the declared fields.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FilterValues(Vec<(usize, Scalar)>);

impl FilterValues {
    /// Reads them from a document's metadata, the text of a JSON object.
    pub fn of(fields: &[FilterField], id: &DocumentId, metadata: Option<&str>) -> Result<Self> {
        let mut values = Self::default();
        let Some(metadata) = metadata.filter(|_| !fields.is_empty()) else {
            return Ok(values);
        };
        let metadata: Map<String, Value> = serde_json::from_str(metadata).map_err(|e| {
            Error::invalid(format!("document {id}: metadata is not a JSON object: {e}"))
        })?;
        for (at, field) in fields.iter().enumerate() {
            match (metadata.get(&field.name), field.kind) {
                (None | Some(Value::Null), _) => {}
                (Some(Value::Array(several)), FilterKind::String) => {
                    for value in several {
                        values.push(at, field, id, value)?;
                    }
                }
                (Some(value), _) => values.push(at, field, id, value)?,
            }
        }
        Ok(values)
    }

    fn push(
        &mut self,
        at: usize,
        field: &FilterField,
        id: &DocumentId,
        value: &Value,
    ) -> Result<()> {
        let fail = |expected: &dyn fmt::Display, found: &dyn fmt::Display| {
            let FilterField { name, kind } = field;
            Err(Error::invalid(format!(
                "document {id}: metadata field {name:?} is declared as a filter of kind {kind}: \
                 expected {expected}, found {found}"
            )))
        };
        match Scalar::read(field.kind, value) {
            Some(Scalar::String(text)) if text.len() > MAX_FILTER_STRING => fail(
                &format!("at most {MAX_FILTER_STRING} bytes"),
                &format!("{}", text.len()),
            ),
            Some(scalar) => {
                self.0.push((at, scalar));
                Ok(())
            }
            None => fail(&field.kind.expected(), &described(value)),
        }
    }

    /// Puts them into a document for Tantivy.
    pub(super) fn add_to(self, columns: &[Field], document: &mut TantivyDocument) {
        for (at, value) in self.0 {
            let Some(column) = columns.get(at).copied() else {
                continue;
            };
            match value {
                Scalar::String(text) => document.add_text(column, text),
                Scalar::I64(number) => document.add_i64(column, number),
                Scalar::F64(number) => document.add_f64(column, number),
                Scalar::Bool(flag) => document.add_bool(column, flag),
            }
        }
    }
}

/// A JSON value in a few words.
fn described(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) => {
            let start: String = text.chars().take(40).collect();
            format!("the string {start:?}")
        }
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// A value of one of the kinds.
#[derive(Debug, Clone, PartialEq)]
enum Scalar {
    String(String),
    I64(i64),
    F64(f64),
    Bool(bool),
}

impl Scalar {
    fn read(kind: FilterKind, value: &Value) -> Option<Self> {
        match (kind, value) {
            (FilterKind::String, Value::String(text)) => Some(Scalar::String(text.clone())),
            (FilterKind::I64, Value::Number(number)) => number.as_i64().map(Scalar::I64),
            (FilterKind::F64, Value::Number(number)) => number.as_f64().map(Scalar::F64),
            (FilterKind::Bool, Value::Bool(flag)) => Some(Scalar::Bool(*flag)),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Gte,
    Gt,
    Lte,
    Lt,
}

const COMPARISONS: [(&str, Comparison); 4] = [
    ("gte", Comparison::Gte),
    ("gt", Comparison::Gt),
    ("lte", Comparison::Lte),
    ("lt", Comparison::Lt),
];

impl Comparison {
    fn holds<N: PartialOrd>(self, value: &N, limit: &N) -> bool {
        match self {
            Comparison::Gte => value >= limit,
            Comparison::Gt => value > limit,
            Comparison::Lte => value <= limit,
            Comparison::Lt => value < limit,
        }
    }
}

/// What is asked of one field.
#[derive(Debug, Clone, PartialEq)]
pub enum Condition {
    /// To be equal to one of these: strings, numbers, true or false.
    AnyOf(Vec<Value>),
    /// To satisfy all of these.
    Range(Vec<(Comparison, Number)>),
}

/// Which documents a search may find: those that satisfy every condition.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Filter {
    conditions: Vec<(String, Condition)>,
}

impl Filter {
    /// A filter that everything passes.
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(mut self, field: impl Into<String>, condition: Condition) -> Self {
        self.conditions.push((field.into(), condition));
        self
    }

    /// Reads an object such as `{"lang": "en", "kind": ["a", "b"], "year": {"gte": 1990, "lt": 2000}}`.
    pub fn from_json(text: &str) -> Result<Self> {
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| Error::invalid(format!("filter: expected a JSON object: {e}")))?;
        let mut filter = Self::new();
        for (field, value) in object {
            let condition = match value {
                Value::Array(any) => Condition::AnyOf(any),
                Value::Object(range) => Condition::Range(read_range(&field, range)?),
                Value::Null => {
                    return Err(Error::invalid(format!(
                        "filter: field {field:?}: expected a value, an array of values or a range, found null"
                    )));
                }
                one => Condition::AnyOf(vec![one]),
            };
            filter = filter.with(field, condition);
        }
        Ok(filter)
    }

    /// The filter in terms of the fields that a store declares.
    pub fn resolve(&self, fields: &[FilterField]) -> Result<ResolvedFilter> {
        let mut tests = Vec::with_capacity(self.conditions.len());
        for (name, condition) in &self.conditions {
            let Some((at, field)) = fields.iter().enumerate().find(|(_, f)| f.name == *name) else {
                let declared = match fields.is_empty() {
                    true => "none".to_owned(),
                    false => fields
                        .iter()
                        .map(|f| format!("{:?} ({})", f.name, f.kind))
                        .collect::<Vec<_>>()
                        .join(", "),
                };
                return Err(Error::invalid(format!(
                    "filter: {name:?} is no field of this store's filters, which are: {declared}"
                )));
            };
            tests.push((at, resolve(field, condition)?));
        }
        Ok(ResolvedFilter(tests))
    }
}

fn read_range(field: &str, range: Map<String, Value>) -> Result<Vec<(Comparison, Number)>> {
    let fail = |found: String| {
        Err(Error::invalid(format!(
            "filter: field {field:?}: a range has numbers under \"gte\", \"gt\", \"lte\", \"lt\", found {found}"
        )))
    };
    if range.is_empty() {
        return fail("none".to_owned());
    }
    let mut limits = Vec::new();
    for (key, value) in range {
        let comparison = COMPARISONS.iter().find(|(name, _)| *name == key);
        match (comparison, value) {
            (Some((_, comparison)), Value::Number(number)) => limits.push((*comparison, number)),
            (None, _) => return fail(format!("the key {key:?}")),
            (_, other) => return fail(format!("{} under {key:?}", described(&other))),
        }
    }
    Ok(limits)
}

fn resolve(field: &FilterField, condition: &Condition) -> Result<Test> {
    let fail = |expected: &str, found: &str| {
        Err(Error::invalid(format!(
            "filter: field {:?} is of kind {}: expected {expected}, found {found}",
            field.name, field.kind
        )))
    };
    let mut test = match (field.kind, condition) {
        (FilterKind::String, Condition::AnyOf(_)) => Test::Strings(Vec::new()),
        (FilterKind::I64, Condition::AnyOf(_)) => Test::AnyI64(Vec::new()),
        (FilterKind::F64, Condition::AnyOf(_)) => Test::AnyF64(Vec::new()),
        (FilterKind::Bool, Condition::AnyOf(_)) => Test::Bools(Vec::new()),
        (FilterKind::I64, Condition::Range(_)) => Test::RangeI64(Vec::new()),
        (FilterKind::F64, Condition::Range(_)) => Test::RangeF64(Vec::new()),
        (FilterKind::String | FilterKind::Bool, Condition::Range(_)) => {
            return fail("a value or an array of values", "a range");
        }
    };
    match condition {
        Condition::AnyOf(values) => {
            for value in values {
                match (&mut test, Scalar::read(field.kind, value)) {
                    (Test::Strings(any), Some(Scalar::String(text))) => any.push(text),
                    (Test::AnyI64(any), Some(Scalar::I64(number))) => any.push(number),
                    (Test::AnyF64(any), Some(Scalar::F64(number))) => any.push(number),
                    (Test::Bools(any), Some(Scalar::Bool(flag))) => any.push(flag),
                    _ => {
                        let expected = match field.kind {
                            FilterKind::String => "a string",
                            kind => kind.expected(),
                        };
                        return fail(expected, &described(value));
                    }
                }
            }
        }
        Condition::Range(limits) => {
            for (comparison, number) in limits {
                match (&mut test, number.as_i64(), number.as_f64()) {
                    (Test::RangeI64(range), Some(n), _) => range.push((*comparison, n)),
                    (Test::RangeF64(range), _, Some(n)) => range.push((*comparison, n)),
                    _ => return fail(field.kind.expected(), &format!("the number {number}")),
                }
            }
        }
    }
    if let Test::AnyI64(any) = &mut test {
        any.sort_unstable();
    }
    Ok(test)
}

#[derive(Debug, Clone, PartialEq)]
enum Test {
    Strings(Vec<String>),
    Bools(Vec<bool>),
    /// Sorted.
    AnyI64(Vec<i64>),
    AnyF64(Vec<f64>),
    RangeI64(Vec<(Comparison, i64)>),
    RangeF64(Vec<(Comparison, f64)>),
}

/// A filter whose fields and types are those of the store that it is for.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedFilter(Vec<(usize, Test)>);

impl ResolvedFilter {
    /// The filter over one segment; none if no document of it can pass.
    pub(super) fn on<'f>(
        &'f self,
        segment: &SegmentReader,
    ) -> tantivy::Result<Option<SegmentFilter<'f>>> {
        let columns = segment.fast_fields();
        let mut tests = Vec::with_capacity(self.0.len());
        for (at, test) in &self.0 {
            let name = column_name(*at);
            let found = match test {
                Test::Strings(any) => match columns.str(&name)? {
                    None => None,
                    Some(column) => {
                        let mut ords = Vec::new();
                        for text in any {
                            ords.extend(column.dictionary().term_ord(text.as_bytes())?);
                        }
                        ords.sort_unstable();
                        (!ords.is_empty()).then(|| SegmentTest::Ords(column.ords().clone(), ords))
                    }
                },
                Test::Bools(any) => columns
                    .column_opt(&name)?
                    .map(|column| SegmentTest::Bools(column, any)),
                Test::AnyI64(any) => columns
                    .column_opt(&name)?
                    .map(|column| SegmentTest::AnyI64(column, any)),
                Test::AnyF64(any) => columns
                    .column_opt(&name)?
                    .map(|column| SegmentTest::AnyF64(column, any)),
                Test::RangeI64(range) => columns
                    .column_opt(&name)?
                    .map(|column| SegmentTest::RangeI64(column, range)),
                Test::RangeF64(range) => columns
                    .column_opt(&name)?
                    .map(|column| SegmentTest::RangeF64(column, range)),
            };
            match found {
                Some(test) => tests.push(test),
                None => return Ok(None),
            }
        }
        Ok(Some(SegmentFilter(tests)))
    }
}

enum SegmentTest<'f> {
    Ords(Column<u64>, Vec<u64>),
    Bools(Column<bool>, &'f [bool]),
    AnyI64(Column<i64>, &'f [i64]),
    AnyF64(Column<f64>, &'f [f64]),
    RangeI64(Column<i64>, &'f [(Comparison, i64)]),
    RangeF64(Column<f64>, &'f [(Comparison, f64)]),
}

fn in_range<N: PartialOrd>(value: &N, range: &[(Comparison, N)]) -> bool {
    range.iter().all(|(c, limit)| c.holds(value, limit))
}

impl SegmentTest<'_> {
    fn passes(&self, doc: DocId) -> bool {
        match self {
            SegmentTest::Ords(column, any) => column
                .values_for_doc(doc)
                .any(|ord| any.binary_search(&ord).is_ok()),
            SegmentTest::Bools(column, any) => {
                column.values_for_doc(doc).any(|flag| any.contains(&flag))
            }
            SegmentTest::AnyI64(column, any) => column
                .values_for_doc(doc)
                .any(|number| any.binary_search(&number).is_ok()),
            SegmentTest::AnyF64(column, any) => column
                .values_for_doc(doc)
                .any(|number| any.contains(&number)),
            SegmentTest::RangeI64(column, range) => column
                .values_for_doc(doc)
                .any(|number| in_range(&number, range)),
            SegmentTest::RangeF64(column, range) => column
                .values_for_doc(doc)
                .any(|number| in_range(&number, range)),
        }
    }
}

/// A filter with the columns of one segment.
pub(super) struct SegmentFilter<'f>(Vec<SegmentTest<'f>>);

impl SegmentFilter<'_> {
    pub(super) fn passes(&self, doc: DocId) -> bool {
        self.0.iter().all(|test| test.passes(doc))
    }
}
