//! Routes: how they are kept (codecs), where (segments), and how logits become weights (phi).

mod codec;
mod decoder;
mod fit;
mod levels;
mod matrix;
mod phi;
mod quantised;
mod router;
mod scalar;
pub(crate) mod scales;
mod seen;
mod segment;
mod sparse;

pub use codec::{Codec, CodecName, Keeps};
pub use decoder::{Decoder, DecoderInput};
pub use levels::Levels;
pub(crate) use matrix::Matrix;
pub use phi::{Phi, route_weights};
pub use router::Router;
pub use scales::{LARGEST, ScaleValues, Scales};
pub use seen::ColumnRange;
pub use segment::RouteSegment;
pub(crate) use segment::{SegmentPlan, SegmentWriter};
