//! Route segments with their presence, and scales.

use std::sync::Arc;

use super::input::{Input, as_it_is};
use super::{WHOLE, sample};
use crate::frame::{Frame, Kind, u64_at};
use crate::presence::Presence;
use crate::routes::{Codec, CodecName, ColumnRange, RouteSegment, ScaleValues, Scales};
use crate::watch::Progress;

/// Of the stores that the routes are of.
const GROUPS: usize = 2;
const EXPERTS: usize = 4;
/// Room for more columns would only take time.
const MOST_COLUMNS: usize = 4096;

pub fn routes(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let map = input.part(Kind::Routes, fitting);
    let Ok(frame) = Frame::open(map.clone(), Kind::Routes) else {
        return false;
    };
    let Some((name, decoder)) = names(&frame) else {
        return false;
    };
    if matches!(name, CodecName::Sparse(k) if k as usize > EXPERTS) {
        return false;
    }
    let codec: Arc<dyn Codec> = name.build(GROUPS, EXPERTS).into();
    if codec.columns() > MOST_COLUMNS {
        return false;
    }
    let Some(scales) = some_scales(codec.columns()) else {
        return false;
    };
    // The store has the decoder that the segment names, and any scales.
    let opened = RouteSegment::open(
        map,
        &name.to_string(),
        Arc::clone(&codec),
        (decoder != [0; 32]).then_some(decoder),
        |_| Some(scales),
    );
    opened.is_ok_and(|segment| read(&segment, codec.as_ref(), name))
}

fn names(frame: &Frame) -> Option<(CodecName, [u8; 32])> {
    let mut fields = frame.fields();
    for _ in 0..4 {
        fields.u64().ok()?;
    }
    let name = fields.name().ok()?;
    Some((name.parse().ok()?, fields.hash().ok()?))
}

/// Whether it is whole.
fn read(segment: &RouteSegment, codec: &dyn Codec, name: CodecName) -> bool {
    let (first, end) = (segment.first(), segment.end());
    assert!(first <= end && segment.rows() <= end - first);
    assert_eq!(segment.docnos(), first..end);
    let verified = segment.verify(&Progress::unseen()).is_ok();
    let mut row = vec![0.0f32; codec.columns()];
    let mut there = 0;
    let mut before: Option<(u64, usize)> = None;
    for docno in sample(first, end) {
        let inside = (first..end).contains(&docno);
        let contained = segment.contains(docno);
        let record = segment.record(docno);
        let decoded = segment.read(docno, &mut row);
        if verified {
            assert!(contained.is_ok() && record.is_ok() && decoded.is_ok());
        }
        let (Ok(contained), Ok(record), Ok(decoded)) = (contained, record, decoded) else {
            continue;
        };
        assert!(contained == record.is_some() && contained == decoded);
        assert!(inside || !contained);
        let Some(record) = record else {
            continue;
        };
        assert_eq!(record.len(), codec.record_bytes());
        // These keep any number, finite or not.
        if !matches!(name, CodecName::F32 | CodecName::F16) {
            assert!(row.iter().all(|x| x.is_finite()));
        }
        there += 1;
        let at = record.as_ptr().addr();
        if let Some((last, place)) = before.replace((docno, at))
            && verified
            && docno > last
        {
            assert!(at >= place + record.len(), "rows ascend with docnos");
        }
    }
    if verified && end - first <= WHOLE {
        assert_eq!(there, segment.rows());
    }
    verified
}

fn some_scales(columns: usize) -> Option<Arc<Scales>> {
    // Centres and scales, and that they were fitted to no row.
    let mut body: Vec<u8> = (0..2 * columns)
        .flat_map(|i| (i as f32 * 0.25).to_le_bytes())
        .collect();
    body.resize(32 * columns, 0);
    let mut bytes = vec![2u8, 2];
    bytes.extend_from_slice(&(columns as u64).to_le_bytes());
    bytes.extend_from_slice(&0u64.to_le_bytes());
    bytes.extend_from_slice(&body);
    let map = Input::split(&bytes)?.part(Kind::Scales, as_it_is);
    Scales::open(map, columns).ok().map(Arc::new)
}

/// A body of the length that the fields ask for.
fn fitting(fields: &[u8], body: &[u8]) -> (Vec<u8>, Vec<u8>) {
    const MOST: u64 = 1 << 16;
    let mut body = body.to_vec();
    let number = |i: usize| u64_at(fields, 8 * i);
    let length = || -> Option<u64> {
        let (count, rows, width) = (number(1)?, number(2)?, number(3)?);
        let records = rows.checked_mul(width)?.checked_next_multiple_of(64)?;
        records.checked_add(Presence::length(count, rows)?)
    };
    if let Some(length) = length().filter(|n| *n <= MOST) {
        body.resize(length as usize, 0);
    }
    (fields.to_vec(), body)
}

/// A body of the length that so many columns ask for.
fn of_columns(fields: &[u8], body: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut body = body.to_vec();
    if let Some(columns) = u64_at(fields, 0).filter(|n| *n <= MOST_COLUMNS as u64) {
        body.resize(32 * columns as usize, 0);
    }
    (fields.to_vec(), body)
}

pub fn scales(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let map = input.part(Kind::Scales, of_columns);
    let Ok(frame) = Frame::open(map.clone(), Kind::Scales) else {
        return false;
    };
    // As many as they say, or another number.
    let columns = match (input.flavour, frame.fields().u64()) {
        (0, Ok(columns)) => columns as usize,
        (flavour, _) => usize::from(flavour),
    };
    let Ok(scales) = Scales::open(map, columns) else {
        return false;
    };
    let values = scales.values();
    assert_eq!(
        (values.centres().len(), values.scales().len()),
        (columns, columns)
    );
    // Rows that come next lead to scales that can be read again, whatever these are said to be fitted to.
    for name in ["q8", "q4", "q1"] {
        let codec = name.parse::<CodecName>().map(|name| name.build(1, columns));
        let Some(levels) = codec.ok().and_then(|codec| codec.levels()) else {
            continue;
        };
        let mut range = ColumnRange::new(columns);
        range.extend(&vec![-1.0; columns]);
        range.extend(&vec![2.5; columns]);
        if values.covers(levels, &range) {
            continue;
        }
        let next = ScaleValues::widen(levels, Some(values), &range);
        for (centre, scale) in next.centres().iter().zip(next.scales()) {
            assert!(*scale >= 0.0 && (centre.abs() + 128.0 * scale).is_finite());
        }
    }
    // Whatever a record holds, it is a number.
    for (name, most) in [("q8", 0x7f), ("q8", 0x80), ("q4", 0xff), ("q1", 0)] {
        let codec = name.parse::<CodecName>().map(|name| name.build(1, columns));
        let Ok(codec) = codec else {
            continue;
        };
        let mut row = vec![f32::NAN; columns];
        codec.decode(&vec![most; codec.record_bytes()], values, &mut row);
        assert!(row.iter().all(|x| x.is_finite()));
    }
    scales.verify().is_ok()
}
