//! The codec that keeps the k largest weights of each group.
//!
//! A record holds for each group k indices in ascending order, one byte each if K <= 256, else two (little endian); then
//! their k weights as bytes, in units in which the largest is 255. Decoding makes each group sum to 1 again.

use crate::routes::codec::{Codec, Keeps};
use crate::routes::levels::Levels;
use crate::routes::scales::ScaleValues;

#[derive(Debug)]
pub struct Sparse {
    groups: usize,
    experts: usize,
    k: usize,
}

/// How far from 1 the weights of a group that is given may sum.
const TOLERANCE: f64 = 1e-3;

impl Sparse {
    pub fn new(groups: usize, experts: usize, k: usize) -> Self {
        Self { groups, experts, k }
    }

    fn index_bytes(&self) -> usize {
        if self.experts <= 256 { 1 } else { 2 }
    }

    fn group_bytes(&self) -> usize {
        self.k * (self.index_bytes() + 1)
    }

    fn index(&self, raw: &[u8]) -> usize {
        raw.iter()
            .rev()
            .fold(0, |index, byte| index << 8 | usize::from(*byte))
    }
}

impl Codec for Sparse {
    fn keeps(&self) -> Keeps {
        Keeps::Weights
    }

    fn columns(&self) -> usize {
        self.groups * self.experts
    }

    fn record_bytes(&self) -> usize {
        self.groups * self.group_bytes()
    }

    fn levels(&self) -> Option<Levels> {
        None
    }

    fn check(&self, row: &[f32]) -> Result<(), String> {
        let bad = |w: &f32| w.is_nan() || *w < 0.0;
        if let Some((i, w)) = row.iter().enumerate().find(|(_, w)| bad(w)) {
            return Err(format!(
                "number {i} is {w}, and a weight is 0 or above: this codec takes weights and no logits"
            ));
        }
        for (group, weights) in row.chunks(self.experts.max(1)).enumerate() {
            let sum: f64 = weights.iter().copied().map(f64::from).sum();
            if (sum - 1.0).abs() > TOLERANCE {
                return Err(format!("the weights of group {group} sum to {sum}, not 1"));
            }
        }
        Ok(())
    }

    fn encode(&self, row: &[f32], _: &ScaleValues, record: &mut Vec<u8>) {
        let mut order: Vec<usize> = Vec::with_capacity(self.experts);
        for weights in row.chunks_exact(self.experts.max(1)) {
            let weight = |i: usize| weights.get(i).copied().unwrap_or_default();
            order.clear();
            order.extend(0..self.experts);
            if let Some(last) = self.k.checked_sub(1).filter(|last| *last < order.len()) {
                order.select_nth_unstable_by(last, |a, b| {
                    weight(*b).total_cmp(&weight(*a)).then(a.cmp(b))
                });
            }
            order.truncate(self.k);
            order.sort_unstable();
            let largest = order.iter().map(|i| weight(*i)).fold(0.0, f32::max);
            for i in &order {
                record.extend(i.to_le_bytes().iter().take(self.index_bytes()));
            }
            record.extend(order.iter().map(|i| {
                let units = f64::from(weight(*i)) / f64::from(largest) * 255.0;
                units.round_ties_even() as u8
            }));
        }
    }

    /// Entries of a damaged record that no group has are left out; a group of which nothing is left weighs 0.
    fn decode(&self, record: &[u8], _: &ScaleValues, row: &mut [f32]) {
        row.fill(0.0);
        let groups = record.chunks_exact(self.group_bytes().max(1));
        for (weights, group) in row.chunks_exact_mut(self.experts.max(1)).zip(groups) {
            let (indices, units) = group.split_at(self.k * self.index_bytes());
            let sum: u32 = units.iter().copied().map(u32::from).sum();
            for (raw, unit) in indices.chunks_exact(self.index_bytes()).zip(units) {
                if let Some(weight) = weights.get_mut(self.index(raw)) {
                    *weight = f32::from(*unit) / sum.max(1) as f32;
                }
            }
        }
    }

    /// Of a weight that is kept, as its share of the weights of the group that are kept: half a unit of its own, and
    /// half a unit of each other one in the sum.
    fn error_bound(&self, value: f32, _: f32, _: f32) -> f32 {
        (1.0 + value * self.k.saturating_sub(1) as f32) / 510.0 + f32::EPSILON
    }
}
