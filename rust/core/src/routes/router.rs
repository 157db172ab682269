//! The amortised router: the tensors of a small network that makes a document's code of its text. The core keeps
//! them by name and computes nothing with them.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::tensors::{self, Header, Slot, Tensor, TensorFile, TensorView};
use crate::watch::Progress;

const MAX_TENSORS: usize = 64;
const MAX_NAME: usize = 128;
/// As for the features of a module.
const MAX_SIDE: usize = u32::MAX as usize;
/// What a safetensors header keeps for something else than a tensor.
const RESERVED: &str = "__metadata__";

/// Named f32 tensors of one or two sides.
#[derive(Debug)]
pub struct Router {
    file: TensorFile,
}

impl Router {
    pub fn open(map: Mapped) -> Result<Self> {
        let path = map.path().to_owned();
        let header = Header::read(map, MAX_TENSORS)?;
        let slots = in_order(header.slots(Dtype::F32));
        match fault(&slots) {
            None => Ok(Self {
                file: header.open(&slots)?,
            }),
            Some((expected, found)) => Err(Error::corrupt(path, "router", expected, found)),
        }
    }

    /// Checks and writes what a creator gives; the same tensors give the same bytes in whatever order they come.
    pub fn write(dir: &Directory, name: &str, router: &[Tensor<'_>]) -> Result<Digest> {
        let slots = router.iter().map(|tensor| Slot {
            name: tensor.name.clone(),
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
        });
        let slots = in_order(slots.collect());
        match fault(&slots) {
            None => tensors::write_given(dir, name, "router", router, &slots),
            Some((expected, found)) => Err(Error::invalid(format!(
                "router: expected {expected}, got {found}"
            ))),
        }
    }

    /// In order of their names.
    pub fn views(&self) -> &[TensorView] {
        self.file.tensors()
    }

    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.file.verify(progress)
    }
}

fn in_order(mut slots: Vec<Slot>) -> Vec<Slot> {
    slots.sort_by(|a, b| a.name.cmp(&b.name));
    slots
}

/// What is expected and what is there instead, if these are not the tensors of a router.
fn fault(slots: &[Slot]) -> Option<(String, String)> {
    if !(1..=MAX_TENSORS).contains(&slots.len()) {
        return Some((
            format!("1 to {MAX_TENSORS} tensors"),
            slots.len().to_string(),
        ));
    }
    slots.iter().find_map(|Slot { name, shape, .. }| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let named = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain);
        if !named || name == RESERVED {
            let expected =
                format!("names of 1 to {MAX_NAME} ASCII letters, digits, '.', '_' or '-'");
            return Some((expected, format!("{name:?}")));
        }
        let sides = shape.iter().all(|n| (1..=MAX_SIDE).contains(n));
        if !(1..=2).contains(&shape.len()) || !sides {
            let expected = format!("{name:?} of one or two sides, each from 1 to {MAX_SIDE}");
            return Some((expected, format!("{shape:?}")));
        }
        None
    })
}
