//! The same documents with their routes, or experts, kept in another way: a new store beside the old one.
//! Documents, ids and index are copied as they are; docnos stay. The amortised router comes along where its decoder does.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::copy::{NewCopy, copy_part};
use crate::documents::DocumentId;
use crate::error::{Error, Result};
use crate::files::Directory;
use crate::generation::Generation;
use crate::manifest::{Current, Hash, Manifest, Part, role};
use crate::routes::{
    Codec, CodecName, ColumnRange, Decoder, DecoderInput, Keeps, Matrix, RouteSegment, ScaleValues,
};
use crate::spec::StoreSpec;
use crate::staged::{Names, StagedRoutes};
use crate::watch::{Progress, Unit, Watch};
use crate::writer::check_row;

/// Rows that are decoded and encoded at once.
const BATCH: usize = 4096;

/// What is to become of a store.
#[derive(Debug, Clone, Copy)]
pub struct Recoding<'r> {
    pub codec: CodecName,
    /// For a codec that keeps codes, unless the source keeps codes of the same length: the new decoder, and the matrix
    /// P of shape [d, groups * K] with which a code is P (z - b).
    pub decoder: Option<(DecoderInput<'r>, &'r [f32])>,
    /// None leaves the experts as they are.
    pub expert_dtype: Option<crate::Dtype>,
}

/// Writes a store, `name` in `parent`, with the documents of `source`.
pub fn recode(
    source: &Generation,
    parent: Directory,
    name: &OsStr,
    recoding: &Recoding<'_>,
    watch: &Arc<dyn Watch>,
) -> Result<()> {
    let spec = StoreSpec {
        codec: recoding.codec,
        ..(*source.spec).clone()
    };
    spec.validate()?;
    let codec: Arc<dyn Codec> = spec.build_codec().into();
    let how = How::of(source, codec.as_ref(), recoding)?;

    // Rows are encoded, after a pass in which scales are fitted to them where there are any.
    let passes = match (&how, codec.levels()) {
        (None, _) => 0,
        (Some(_), None) => 1,
        (Some(_), Some(_)) => 2,
    };
    let mut rows = source.routes.iter().map(RouteSegment::rows);
    let width = source.codec.record_bytes() as u64;
    let read = rows.try_fold(0u64, |sum, rows| sum.checked_add(rows.checked_mul(width)?));
    let encoded = read.unwrap_or(u64::MAX).saturating_mul(passes);
    let expert_dtype = recoding.expert_dtype.unwrap_or(source.experts.dtype());
    let times = |part: &Part| match part.role.as_str() {
        role::EXPERTS => source.experts.times(expert_dtype),
        role::ROUTES | role::SCALES if passes > 0 => 0,
        _ => 1,
    };
    let parts = source.manifest().parts.iter();
    let total = parts.fold(encoded, |sum, part| {
        sum.saturating_add(part.length.saturating_mul(times(part)))
    });
    let progress = Progress::begin(watch, Unit::Bytes, total)?;
    let mut copy = NewCopy::begin(parent, name)?;
    let dir = copy.folder.dir();
    let mut manifest = Manifest {
        previous: None,
        previous_blake3: None,
        spec: spec.clone(),
        parts: Vec::new(),
        ..source.manifest().clone()
    };
    let mut names = Names::new(manifest.generation);
    let mut decoder_hash = None;
    for part in &source.manifest().parts {
        match part.role.as_str() {
            role::EXPERTS if expert_dtype != source.experts.dtype() => {
                let file = names.next(role::EXPERTS, "safetensors");
                let digest = source
                    .experts
                    .rewrite(dir, &file, expert_dtype, &progress)?;
                manifest.parts.push(Part::new(role::EXPERTS, file, digest));
            }
            role::DECODER if !matches!(how, None | Some(How::Codes)) => {}
            role::ROUTES | role::SCALES if how.is_some() => {}
            role::ROUTER => {} // below, when the decoder is known
            role => {
                copy_part(&source.dir, part, dir, &progress)?;
                manifest.parts.push(part.clone());
                if role == role::DECODER {
                    decoder_hash = Some(part.blake3);
                }
            }
        }
    }
    if let Some(How::Project { decoder, .. }) = &how {
        let file = names.next(role::DECODER, "safetensors");
        let digest = Decoder::write(dir, &file, decoder, spec.logits(), codec.columns())?;
        decoder_hash = Some(Hash(digest.blake3));
        manifest.parts.push(Part::new(role::DECODER, file, digest));
    }

    // A router makes codes for the decoder that it was trained with, and for no other.
    let decoder_before = source.manifest().of_role(role::DECODER).next();
    if decoder_before.map(|part| part.blake3) == decoder_hash {
        for part in source.manifest().of_role(role::ROUTER) {
            copy_part(&source.dir, part, dir, &progress)?;
            manifest.parts.push(part.clone());
        }
    }

    if let Some(how) = &how {
        let routes = StagedRoutes::new(&[], decoder_hash, spec.codec.to_string());
        let parts = encode(
            source,
            dir,
            (codec.as_ref(), spec.codec),
            how,
            &mut names,
            routes,
            &progress,
        )?;
        manifest.parts.extend(parts);
    }

    let file = Manifest::name(manifest.generation);
    let json = manifest.to_json(&dir.path_of(&file))?;
    let current = Current {
        manifest: file,
        blake3: Hash(*blake3::hash(&json).as_bytes()),
    };
    copy.finish(&current, &json, &progress)
}

/// Scales and segments of all rows.
fn encode(
    source: &Generation,
    dir: &Directory,
    to: (&dyn Codec, CodecName),
    how: &How<'_>,
    names: &mut Names,
    mut routes: StagedRoutes,
    progress: &Progress,
) -> Result<Vec<Part>> {
    let (codec, _) = to;
    if let Some(levels) = codec.levels() {
        // Once over all rows, so that one set of scales serves them all where they are drawn alike.
        let mut range = ColumnRange::new(codec.columns());
        each_batch(source, to, how, progress, &mut |_, rows| {
            rows.chunks_exact(codec.columns().max(1))
                .for_each(|row| range.extend(row));
            Ok(())
        })?;
        // Fitted to nothing they would be around 0, and those of the first routes wide enough to reach there.
        if !range.is_empty() {
            routes.use_scales(dir, names, &ScaleValues::fit(levels, &range))?;
        }
    }
    each_batch(source, to, how, progress, &mut |docnos, rows| {
        routes.encode(dir, codec, names, docnos, rows)
    })?;
    routes.finish()
}

/// How a row of the new store comes from the old one.
enum How<'r> {
    Logits,
    Weights,
    /// The codes as they are, with the same decoder.
    Codes,
    Project {
        decoder: &'r DecoderInput<'r>,
        project: Matrix,
    },
}

impl<'r> How<'r> {
    /// None if the records stay as they are.
    fn of(
        source: &Generation,
        codec: &dyn Codec,
        recoding: &'r Recoding<'r>,
    ) -> Result<Option<Self>> {
        let (from, to) = (source.spec.codec, recoding.codec);
        if source.codec.keeps() == Keeps::Weights && codec.keeps() != Keeps::Weights {
            return Err(Error::invalid(format!(
                "recode: codec {from} keeps weights alone, and {to} needs the logits: recode from the store that it was made of"
            )));
        }
        if from == to && recoding.decoder.is_none() {
            return Ok(None);
        }
        let how = match (codec.keeps(), &recoding.decoder) {
            (Keeps::Logits, None) => How::Logits,
            (Keeps::Weights, None) => How::Weights,
            (Keeps::Code, Some((decoder, project))) => {
                let (words, _) = decoder.b.as_chunks::<4>();
                let b: Vec<f32> = words.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
                let (d, logits) = (codec.columns(), source.spec.logits());
                if b.len() != logits || Some(project.len()) != d.checked_mul(logits) {
                    return Err(Error::invalid(format!(
                        "recode: expected b of {logits} numbers and a projection of [{d}, {logits}], got {} and {}",
                        b.len(),
                        project.len()
                    )));
                }
                // P (z - b) = P z - P b
                let offset: Vec<f32> = project
                    .chunks_exact(logits.max(1))
                    .map(|p| {
                        let products = p.iter().zip(&b).map(|(p, b)| f64::from(*p) * f64::from(*b));
                        -products.sum::<f64>() as f32
                    })
                    .collect();
                let project = Matrix::new(project, &offset, logits);
                How::Project { decoder, project }
            }
            (Keeps::Code, None)
                if source.codec.keeps() == Keeps::Code
                    && source.codec.columns() == codec.columns() =>
            {
                How::Codes
            }
            (Keeps::Code, None) => {
                return Err(Error::invalid(format!(
                    "recode: from {from} to {to} a decoder must be fitted and given"
                )));
            }
            (_, Some(_)) => {
                return Err(Error::invalid(format!(
                    "recode: codec {to} takes no decoder"
                )));
            }
        };
        Ok(Some(how))
    }
}

/// Takes docnos and their rows.
type Each<'e> = dyn FnMut(&[u64], &[f32]) -> Result<()> + 'e;

/// Calls `each` with the rows of living documents for the new codec, which can keep them, batch by batch.
fn each_batch(
    source: &Generation,
    (codec, name): (&dyn Codec, CodecName),
    how: &How<'_>,
    progress: &Progress,
    each: &mut Each<'_>,
) -> Result<()> {
    let width = source.codec.record_bytes() as u64;
    let mut docnos = Vec::with_capacity(BATCH);
    let columns = codec.columns().max(1);
    let mut work = |docnos: &mut Vec<u64>| -> Result<()> {
        let rows = match how {
            How::Codes => source.rows(docnos)?,
            How::Logits => source.logits(docnos)?,
            How::Weights => source.weights(docnos)?,
            How::Project { project, .. } => {
                let mut codes = vec![0.0; docnos.len() * project.logits()];
                project.multiply(&source.logits(docnos)?, &mut codes);
                codes
            }
        };
        let mut each_row = docnos.iter().zip(rows.chunks_exact(columns));
        if let Some((docno, row)) = each_row.find(|(_, row)| codec.check(row).is_err()) {
            let id = source.id_of(*docno)?.unwrap_or(DocumentId::U64(*docno));
            check_row(codec, name, &id, row)?;
        }
        each(docnos, &rows)?;
        docnos.clear();
        Ok(())
    };
    for segment in &source.routes {
        for docno in segment.docnos() {
            if segment.contains(docno)? {
                progress.add(width)?;
                if source.is_alive(docno) {
                    docnos.push(docno);
                }
            }
            if docnos.len() == BATCH {
                work(&mut docnos)?;
            }
        }
    }
    match docnos.is_empty() {
        true => Ok(()),
        false => work(&mut docnos),
    }
}
