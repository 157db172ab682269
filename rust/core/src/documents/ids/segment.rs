//! A segment of ids as it lies in a part, and how it is written: the body is the table of the space, the keys
//! in order of docnos, presence, and the order of the ids unless they ascend.

use crate::documents::DocumentId;
use crate::documents::ids::bits::{BitPacker, bits_at, packed_bytes, width_of};
use crate::documents::ids::numbers::{BLOCK, Numbers, NumbersWriter, directory_bytes};
use crate::documents::ids::search::count_up_to;
use crate::documents::ids::space::{Form, KeptKey, Key, Space};
use crate::documents::ids::text::{MAX_BLOCK, TextWriter, Texts, Walk};
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};
use crate::presence::{Presence, PresenceBuilder};
use crate::spec::{IdType, MAX_NAME};
use crate::watch::Progress;

/// The table of a space is as long as this at most: a template of the longest ids with all bytes.
const MAX_TABLE: u64 = MAX_NAME as u64 * 257;
/// What was packed goes to the file in pieces of about this size.
const PIECE: usize = 1 << 16;

/// Where things are in the body.
#[derive(Debug, Clone, Copy)]
struct Layout {
    data: u64,
    data_bytes: u64,
    offsets: u64,
    offsets_bytes: u64,
    directory: u64,
    directory_bytes: u64,
    presence: u64,
    order: u64,
    order_bytes: u64,
    body: u64,
}

/// The fields of the part.
#[derive(Debug, Clone, Copy)]
struct Header {
    first: u64,
    count: u64,
    rows: u64,
    code: u64,
    ascending: bool,
    table: u64,
    data: u64,
    offsets: u64,
    block: u64,
}

impl Header {
    fn list(&self) -> Option<u64> {
        match self.code {
            0..=2 => Some(self.rows),
            3 => Some(0),
            _ => self
                .rows
                .checked_add(self.block)?
                .checked_sub(1)?
                .checked_div(self.block)?
                .checked_add(1),
        }
    }

    fn order_width(&self) -> u32 {
        match self.ascending {
            true => 0,
            false => width_of(self.rows.saturating_sub(1)),
        }
    }

    fn layout(&self) -> Option<Layout> {
        let data = self.table.checked_next_multiple_of(8)?;
        let offsets = data.checked_add(self.data)?.checked_next_multiple_of(8)?;
        let directory = offsets.checked_add(self.offsets)?;
        let directory_bytes = directory_bytes(self.list()?)?;
        let presence = directory.checked_add(directory_bytes)?;
        let order = presence.checked_add(Presence::length(self.count, self.rows)?)?;
        let order_bytes = packed_bytes(self.rows, self.order_width())?;
        Some(Layout {
            data,
            data_bytes: self.data,
            offsets,
            offsets_bytes: self.offsets,
            directory,
            directory_bytes,
            presence,
            order,
            order_bytes,
            body: order.checked_add(order_bytes)?,
        })
    }
}

#[derive(Debug)]
pub struct IdSegment {
    frame: Frame,
    header: Header,
    layout: Layout,
    space: Space,
    presence: Presence,
}

impl IdSegment {
    pub fn open(map: Mapped, id_type: IdType) -> Result<Self> {
        let frame = Frame::open(map, Kind::Ids)?;
        let mut fields = frame.fields();
        let mut next = || fields.u64();
        let (first, count, rows, code) = (next()?, next()?, next()?, next()?);
        let (ascending, table, data) = (next()?, next()?, next()?);
        let (offsets, block) = (next()?, next()?);
        let header = Header {
            first,
            count,
            rows,
            code,
            ascending: ascending == 1,
            table,
            data,
            offsets,
            block,
        };
        if first.checked_add(count).is_none() || rows > count || ascending > 1 {
            let found = format!("{rows} rows for {count} docnos from {first}, order {ascending}");
            return Err(frame.corrupt("docno range", "a range that holds its rows", found));
        }
        let layout = header
            .layout()
            .filter(|l| l.body == frame.body().len() as u64)
            .ok_or_else(|| {
                let found = format!("{} bytes", frame.body().len());
                frame.corrupt("body", "as many bytes as its fields say", found)
            })?;
        let space = match table <= MAX_TABLE {
            true => Space::parse(code, frame.section(0, table, "table of ids")?),
            false => None,
        };
        let space = space.filter(|space| space.id_type() == id_type);
        let Some(space) = space else {
            let found = format!("encoding {code} with a table of {table} bytes");
            return Err(frame.corrupt("ids", format!("ids of type {id_type:?}"), found));
        };
        let fits = match space.form() {
            Form::Number => offsets == 0 && block == 0 && data % 8 == 0,
            Form::Packed(width) => {
                rows.checked_mul(width as u64) == Some(data) && offsets == 0 && block == 0
            }
            Form::Text => (1..=MAX_BLOCK).contains(&block) && offsets % 8 == 0,
        };
        if !fits {
            let found = format!("{data} bytes, {offsets} of offsets, blocks of {block}");
            return Err(frame.corrupt("ids", format!("encoding {code}"), found));
        }
        let presence = Presence::new(layout.presence, count, rows);
        Ok(Self {
            frame,
            header,
            layout,
            space,
            presence,
        })
    }

    pub fn first(&self) -> u64 {
        self.header.first
    }

    /// The docno after the last of the range; not above `u64::MAX`, as `open` has checked.
    pub fn end(&self) -> u64 {
        self.header.first.saturating_add(self.header.count)
    }

    /// How many docnos of the range have an id.
    pub fn rows(&self) -> u64 {
        self.header.rows
    }

    /// Whether the ids ascend with the docnos, so that none occurs twice.
    pub(super) fn ascends(&self) -> bool {
        self.header.ascending
    }

    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// Strings of one block, if there are blocks.
    pub(super) fn text_block(&self) -> Option<u64> {
        (self.header.block > 0).then_some(self.header.block)
    }

    pub(super) fn broken(&self, what: &str) -> Error {
        self.frame
            .corrupt(what, "what its fields promise", "something else")
    }

    pub(super) fn keys(&self) -> Result<Keys<'_>> {
        let data = self
            .frame
            .section(self.layout.data, self.layout.data_bytes, "ids")?;
        let directory = self.frame.section(
            self.layout.directory,
            self.layout.directory_bytes,
            "directory",
        )?;
        let rows = self.header.rows;
        Ok(match self.space.form() {
            Form::Number => Keys::Numbers(Numbers {
                packed: data,
                directory,
                count: rows,
            }),
            Form::Packed(width) => Keys::Packed { data, width },
            Form::Text => Keys::Text(Texts {
                text: data,
                offsets: Numbers {
                    packed: self.frame.section(
                        self.layout.offsets,
                        self.layout.offsets_bytes,
                        "offsets",
                    )?,
                    directory,
                    count: self.header.list().unwrap_or_default(),
                },
                block: self.header.block,
                rows,
            }),
        })
    }

    pub(super) fn order(&self) -> Result<Order<'_>> {
        let order = self
            .frame
            .section(self.layout.order, self.layout.order_bytes, "order")?;
        Ok(Order {
            packed: (!self.header.ascending).then_some((order, self.header.order_width())),
            rows: self.header.rows,
        })
    }

    /// The row of a docno, if it has one.
    pub(super) fn row(&self, docno: u64) -> Result<Option<u64>> {
        match docno.checked_sub(self.header.first) {
            Some(i) => self.presence.row(&self.frame, i),
            None => Ok(None),
        }
    }

    pub(super) fn docno(&self, row: u64) -> Result<u64> {
        let i = self.presence.select(&self.frame, row)?;
        Ok(self.header.first.saturating_add(i))
    }

    /// The docnos of the range that have an id, ascending.
    pub fn docnos(&self) -> impl Iterator<Item = u64> + '_ {
        let all = self.header.rows == self.header.count;
        // A broken presence has no docnos here; what reads rows finds that it is broken.
        (self.first()..self.end()).filter(move |d| all || self.contains(*d).unwrap_or(false))
    }

    pub fn contains(&self, docno: u64) -> Result<bool> {
        Ok(self.row(docno)?.is_some())
    }

    /// The id of a docno of this range, if it has one.
    pub fn id(&self, docno: u64) -> Result<Option<DocumentId>> {
        match self.row(docno)? {
            Some(row) => self.id_of_row(row).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn id_of_row(&self, row: u64) -> Result<DocumentId> {
        let mut buffer = Vec::new();
        let key = self.keys()?.get(row, &mut buffer);
        self.id_of_key(key.ok_or_else(|| self.broken("ids"))?)
    }

    fn id_of_key(&self, key: Key<'_>) -> Result<DocumentId> {
        let mut buffer = Vec::new();
        match self.space.id(key, &mut buffer) {
            Some(Key::Number(n)) => Ok(DocumentId::U64(n)),
            Some(Key::Bytes(bytes)) => match std::str::from_utf8(bytes) {
                Ok(text) => Ok(DocumentId::String(text.to_owned())),
                Err(e) => Err(self.frame.corrupt("id", "UTF-8", e)),
            },
            None => Err(self.frame.corrupt("id", "a key of its template", "another")),
        }
    }

    /// The newest docno that has this id and is alive.
    pub fn find(&self, id: &DocumentId, is_dead: impl Fn(u64) -> bool) -> Result<Option<u64>> {
        let (mut packed, mut buffer) = (Vec::new(), Vec::new());
        let Some(key) = self.space.key(Key::from(id), &mut packed) else {
            return Ok(None);
        };
        let (keys, order) = (self.keys()?, self.order()?);
        let mut rank = count_up_to(&keys, &order, self.header.rows, key)
            .ok_or_else(|| self.broken("order"))?;
        // A document that was replaced within one commit has several rows, side by side.
        while let Some(before) = rank.checked_sub(1) {
            rank = before;
            let row = order.get(rank).ok_or_else(|| self.broken("order"))?;
            if keys.get(row, &mut buffer) != Some(key) {
                break;
            }
            let docno = self.docno(row)?;
            if !is_dead(docno) {
                return Ok(Some(docno));
            }
        }
        Ok(None)
    }

    /// Checksums, presence, the order, and that every id is one.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.frame.verify(progress)?;
        let share = self.bytes_per_row();
        self.presence.verify(&self.frame)?;
        let zeros = |from: u64, to: u64| {
            let padding = self.frame.section(from, to.saturating_sub(from), "padding");
            Ok::<_, Error>(padding?.iter().all(|b| *b == 0))
        };
        let data_end = self.layout.data + self.layout.data_bytes;
        if !zeros(self.header.table, self.layout.data)? || !zeros(data_end, self.layout.offsets)? {
            return Err(self.frame.corrupt("padding", "zeros", "others"));
        }
        let keys = self.keys()?;
        if !keys.is_tight() {
            return Err(self.broken("directory"));
        }
        let mut last = KeptKey::default();
        let mut buffer = Vec::new();
        let mut forward = Forward::new(keys);
        while let Some(key) = forward.next().map_err(|_| self.broken("ids"))? {
            let id = self.id_of_key(key)?;
            // The same id under another key would not be found.
            if self.space.key(Key::from(&id), &mut buffer) != Some(key) {
                return Err(self.frame.corrupt("id", "its own key", "another"));
            }
            if self.header.ascending && last.get().is_some_and(|last| last >= key) {
                let found = format!("another before {id}");
                return Err(self.frame.corrupt("ids", "ascending ids", found));
            }
            last.set(key);
            progress.add(share)?;
        }
        self.verify_order(keys, progress)
    }

    /// Of the body.
    pub fn bytes_per_row(&self) -> u64 {
        (self.frame.body().len() as u64)
            .checked_div(self.header.rows)
            .unwrap_or(0)
    }

    fn verify_order(&self, keys: Keys<'_>, progress: &Progress) -> Result<()> {
        let share = self.bytes_per_row();
        let order = self.order()?;
        if order.packed.is_none() {
            return Ok(());
        }
        let (mut buffer, mut last, mut last_row) = (Vec::new(), KeptKey::default(), 0);
        for rank in 0..self.header.rows {
            let row = order.get(rank).ok_or_else(|| self.broken("order"))?;
            let key = keys.get(row, &mut buffer);
            let key = key.ok_or_else(|| self.broken("order"))?;
            if last
                .get()
                .is_some_and(|last| (last, last_row) >= (key, row))
            {
                let found = format!("another at {rank}");
                return Err(self.frame.corrupt("order", "ascending ids", found));
            }
            last.set(key);
            last_row = row;
            progress.add(share)?;
        }
        match order.is_tight() {
            true => Ok(()),
            false => Err(self.frame.corrupt("order", "zeros after it", "others")),
        }
    }
}

/// The keys of the rows, in the space of the segment. `None` means that a row is outside or broken.
#[derive(Debug, Clone, Copy)]
pub(super) enum Keys<'s> {
    Numbers(Numbers<'s>),
    Packed { data: &'s [u8], width: usize },
    Text(Texts<'s>),
}

impl<'s> Keys<'s> {
    #[inline]
    pub fn get<'k>(&self, row: u64, buffer: &'k mut Vec<u8>) -> Option<Key<'k>>
    where
        's: 'k,
    {
        match self {
            Keys::Numbers(numbers) => numbers.get(row).map(Key::Number),
            Keys::Packed { data, width } => {
                let start = usize::try_from(row).ok()?.checked_mul(*width)?;
                data.get(start..start.checked_add(*width)?).map(Key::Bytes)
            }
            Keys::Text(texts) => {
                texts.read(row, buffer)?;
                Some(Key::Bytes(buffer))
            }
        }
    }

    fn is_tight(&self) -> bool {
        match self {
            Keys::Numbers(numbers) => numbers.is_tight(),
            Keys::Packed { .. } => true,
            Keys::Text(texts) => texts.is_tight(),
        }
    }
}

/// The rows in order of (id, row).
#[derive(Debug, Clone, Copy)]
pub(super) struct Order<'s> {
    /// None if that is the order of the rows.
    packed: Option<(&'s [u8], u32)>,
    rows: u64,
}

impl Order<'_> {
    #[inline]
    pub fn get(&self, rank: u64) -> Option<u64> {
        if rank >= self.rows {
            return None;
        }
        match self.packed {
            None => Some(rank),
            Some((bytes, width)) => {
                let row = bits_at(bytes, rank.checked_mul(u64::from(width))?, width)?;
                (row < self.rows).then_some(row)
            }
        }
    }

    fn is_tight(&self) -> bool {
        let Some((bytes, width)) = self.packed else {
            return true;
        };
        let bits = self.rows * u64::from(width);
        let spare = (bits.next_multiple_of(64) - bits) as u32;
        bits_at(bytes, bits, spare) == Some(0)
    }
}

/// What is read is not what the fields promise.
#[derive(Debug)]
pub(super) struct Broken;

/// The keys of all rows, one after the other.
#[derive(Debug)]
pub(super) struct Forward<'s> {
    keys: Keys<'s>,
    row: u64,
    /// The numbers of the block of this row.
    numbers: Vec<u64>,
    walk: Option<Walk<'s>>,
    text: Vec<u8>,
}

impl<'s> Forward<'s> {
    pub fn new(keys: Keys<'s>) -> Self {
        Self {
            keys,
            row: 0,
            numbers: Vec::new(),
            walk: None,
            text: Vec::new(),
        }
    }

    #[inline]
    pub fn next(&mut self) -> Result<Option<Key<'_>>, Broken> {
        let row = self.row;
        self.row += 1;
        let key = match &self.keys {
            Keys::Numbers(numbers) => {
                if row >= numbers.count {
                    return Ok(None);
                }
                let at = row % BLOCK as u64;
                if at == 0 {
                    let block = row / BLOCK as u64;
                    numbers.block(block, &mut self.numbers).ok_or(Broken)?;
                }
                self.numbers.get(at as usize).copied().map(Key::Number)
            }
            Keys::Packed { data, width } => {
                let start = (row as usize).checked_mul(*width).ok_or(Broken)?;
                if start >= data.len() {
                    return Ok(None);
                }
                data.get(start..start + width).map(Key::Bytes)
            }
            Keys::Text(texts) => {
                if row >= texts.rows {
                    return Ok(None);
                }
                if self.walk.as_ref().is_none_or(Walk::is_over) {
                    let block = row.checked_div(texts.block);
                    self.walk = block.and_then(|block| texts.walk(block));
                }
                let walk = self.walk.as_mut();
                walk.and_then(|walk| walk.next(&mut self.text))
                    .map(|()| Key::Bytes(&self.text))
            }
        };
        key.map(Some).ok_or(Broken)
    }
}

/// Writes a segment: the keys of the rows first, then [`SegmentWriter::end_rows`], then the order if one is
/// needed.
#[derive(Debug)]
pub(super) struct SegmentWriter {
    frame: FrameWriter,
    header: Header,
    data: Data,
    out: Vec<u8>,
    last: KeptKey,
    order: BitPacker,
    ordered: u64,
}

#[derive(Debug)]
enum Data {
    Numbers(NumbersWriter),
    Packed,
    Text(TextWriter),
}

impl SegmentWriter {
    /// `block` is for text: how many strings a block has.
    pub fn create(dir: &Directory, name: &str, space: &Space, block: u64) -> Result<Self> {
        let mut frame = FrameWriter::create(dir, name, Kind::Ids)?;
        let table = space.table();
        frame.write(&table)?;
        frame.pad(8)?;
        let data = match space.form() {
            Form::Number => Data::Numbers(NumbersWriter::default()),
            Form::Packed(_) => Data::Packed,
            Form::Text => Data::Text(TextWriter::new(block)),
        };
        let header = Header {
            first: 0,
            count: 0,
            rows: 0,
            code: space.code(),
            ascending: true,
            table: table.len() as u64,
            data: 0,
            offsets: 0,
            block: match data {
                Data::Text(_) => block,
                _ => 0,
            },
        };
        Ok(Self {
            frame,
            header,
            data,
            out: Vec::with_capacity(2 * PIECE),
            last: KeptKey::default(),
            order: BitPacker::default(),
            ordered: 0,
        })
    }

    /// The key of the next row, in the space that the writer was created with.
    #[inline]
    pub fn push(&mut self, key: Key<'_>) -> Result<()> {
        if self.header.ascending {
            self.header.ascending = self.last.get().is_none_or(|last| last < key);
            self.last.set(key);
        }
        match (&mut self.data, key) {
            (Data::Numbers(numbers), Key::Number(n)) => numbers.push(n, &mut self.out),
            (Data::Packed, Key::Bytes(value)) => self.out.extend_from_slice(value),
            (Data::Text(texts), Key::Bytes(text)) => texts.push(text, &mut self.out),
            _ => return Err(Error::invalid("an id of another type than its segment")),
        }
        self.header.rows += 1;
        self.drain(PIECE)
    }

    fn drain(&mut self, from: usize) -> Result<()> {
        if self.out.len() >= from {
            self.frame.write(&self.out)?;
            self.out.clear();
        }
        Ok(())
    }

    /// Ends the rows; `presence` says which docnos from `first` on they belong to. Returns whether they
    /// ascend: otherwise all rows must follow in order of (id, row).
    pub fn end_rows(&mut self, first: u64, presence: &PresenceBuilder) -> Result<bool> {
        let start = self.header.table.next_multiple_of(8);
        let data = std::mem::replace(&mut self.data, Data::Packed);
        let (mut offsets, mut directory) = (Vec::new(), Vec::new());
        match data {
            Data::Numbers(numbers) => directory = numbers.finish(&mut self.out),
            Data::Packed => {}
            Data::Text(texts) => (offsets, directory) = texts.finish(&mut self.out),
        }
        self.drain(0)?;
        self.header.data = self.frame.length() - start;
        self.frame.pad(8)?;
        self.header.offsets = offsets.len() as u64;
        self.header.first = first;
        self.header.count = presence.count();
        self.frame.write(&offsets)?;
        self.frame.write(&directory)?;
        self.frame.write(&presence.to_bytes())?;
        Ok(self.header.ascending)
    }

    /// The next row in order of (id, row).
    #[inline]
    pub fn push_order(&mut self, row: u64) -> Result<()> {
        let width = self.header.order_width();
        self.order.push(row, width, &mut self.out);
        self.ordered += 1;
        self.drain(PIECE)
    }

    pub fn finish(mut self) -> Result<Digest> {
        if !self.header.ascending && self.ordered != self.header.rows {
            return Err(Error::invalid("the order of ids is not that of their rows"));
        }
        self.order.finish(&mut self.out);
        self.drain(0)?;
        let header = self.header;
        let fields = FieldsWriter::new()
            .u64(header.first)
            .u64(header.count)
            .u64(header.rows)
            .u64(header.code)
            .u64(u64::from(header.ascending))
            .u64(header.table)
            .u64(header.data)
            .u64(header.offsets)
            .u64(header.block);
        self.frame.finish(fields)
    }
}
