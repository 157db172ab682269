//! z = V c + b for many codes at once.
//!
//! Numbers of neighbouring logits lie side by side, and each has its own sum: a wider vector unit works on more of them
//! at a time, in the same order. Products and sums are rounded one by one (none is fused), so that a code has the same
//! logits, bit for bit, alone or among others, on any processor.

use multiversion::multiversion;

/// Logits that are computed side by side, and codes for which a number of V is loaded once. With these, the sums stay in
/// the registers of AVX2 and AVX-512 alike.
const LANES: usize = 32;
const CODES: usize = 2;

/// Products that are summed in f32, before their sum is added in f64.
///
/// So |z - (V c + b)| is at most 65 * 2^-24 * sum_j |V_j c_j| + 2^-24 * |z|, which is below 4e-6 * (sum_j |V_j c_j| + |b|).
const CHUNK: usize = 64;

/// Codes between which V stays in a near cache.
const BATCH: usize = 64;

/// V of [logits, columns] and b of [logits].
#[derive(Debug)]
pub struct Matrix {
    /// For each `LANES` logits their numbers of column 0, then of column 1, and so on; zeros beyond the last logit.
    panels: Vec<[f32; LANES]>,
    b: Vec<[f32; LANES]>,
    logits: usize,
    columns: usize,
}

impl Matrix {
    /// Of numbers in C order.
    pub fn new(v: &[f32], b: &[f32], columns: usize) -> Self {
        let columns = columns.max(1);
        let mut panels = Vec::new();
        for rows in v.chunks(LANES * columns) {
            let start = panels.len();
            panels.resize(start + columns, [0.0; LANES]);
            let panel = panels.get_mut(start..).unwrap_or_default();
            for (lane, row) in rows.chunks(columns).enumerate() {
                for (lanes, x) in panel.iter_mut().zip(row) {
                    lanes[lane] = *x;
                }
            }
        }
        let lanes = |b: &[f32]| {
            let mut lanes = [0.0; LANES];
            lanes.iter_mut().zip(b).for_each(|(lane, x)| *lane = *x);
            lanes
        };
        Self {
            panels,
            b: b.chunks(LANES).map(lanes).collect(),
            logits: b.len(),
            columns,
        }
    }

    pub fn logits(&self) -> usize {
        self.logits
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The logits of codes, row after row.
    pub fn multiply(&self, codes: &[f32], logits: &mut [f32]) {
        let mut pairs = Vec::new();
        let outputs = logits.chunks_mut(BATCH * self.logits.max(1));
        for (codes, logits) in codes.chunks(BATCH * self.columns).zip(outputs) {
            pairs.clear();
            for rows in codes.chunks(CODES * self.columns) {
                let start = pairs.len();
                pairs.resize(start + self.columns, [0.0; CODES]);
                let pair = pairs.get_mut(start..).unwrap_or_default();
                for (i, row) in rows.chunks(self.columns).enumerate() {
                    pair.iter_mut().zip(row).for_each(|(pair, x)| pair[i] = *x);
                }
            }
            multiply(
                &self.panels,
                &self.b,
                self.columns,
                &pairs,
                self.logits,
                logits,
            );
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn multiply(
    panels: &[[f32; LANES]],
    b: &[[f32; LANES]],
    columns: usize,
    pairs: &[[f32; CODES]],
    width: usize,
    logits: &mut [f32],
) {
    for ((i, panel), b) in panels.chunks_exact(columns).enumerate().zip(b) {
        let mut rows = logits.chunks_exact_mut(width);
        for pair in pairs.chunks_exact(columns) {
            let mut sums = [b.map(f64::from); CODES];
            for (panel, pair) in panel.chunks(CHUNK).zip(pair.chunks(CHUNK)) {
                let mut parts = [[0.0f32; LANES]; CODES];
                for (v, c) in panel.iter().zip(pair) {
                    for (part, c) in parts.iter_mut().zip(c) {
                        for (part, v) in part.iter_mut().zip(v) {
                            *part += c * v;
                        }
                    }
                }
                for (sums, parts) in sums.iter_mut().zip(&parts) {
                    for (sum, part) in sums.iter_mut().zip(parts) {
                        *sum += f64::from(*part);
                    }
                }
            }
            for (sums, row) in sums.iter().zip(rows.by_ref()) {
                let here = row.get_mut(i * LANES..).unwrap_or_default();
                for (z, sum) in here.iter_mut().zip(sums) {
                    *z = *sum as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    fn numbers(n: usize) -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![4 => -3.0f32..3.0, 1 => -1e4f32..1e4, 1 => Just(0.0)];
        prop::collection::vec(number, n)
    }

    /// V, b, codes and the number of columns.
    fn products() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, Vec<f32>, usize)> {
        let columns = prop_oneof![1usize..70, 120usize..300];
        (1usize..80, columns, 1usize..7).prop_flat_map(|(logits, columns, n)| {
            (
                numbers(logits * columns),
                numbers(logits),
                numbers(n * columns),
                Just(columns),
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_product_is_that_in_f64_and_of_the_same_bits_in_any_company(
            (v, b, codes, columns) in products()
        ) {
            let matrix = Matrix::new(&v, &b, columns);
            let n = codes.len() / columns;
            let mut all = vec![f32::NAN; n * b.len()];
            matrix.multiply(&codes, &mut all);
            for (code, z) in codes.chunks(columns).zip(all.chunks(b.len())) {
                let mut alone = vec![f32::NAN; b.len()];
                matrix.multiply(code, &mut alone);
                for (i, z) in z.iter().enumerate() {
                    prop_assert_eq!(z.to_bits(), alone[i].to_bits());
                    let row = &v[i * columns..][..columns];
                    let products = row.iter().zip(code).map(|(v, c)| f64::from(*v) * f64::from(*c));
                    let (sum, size) = products.fold(
                        (f64::from(b[i]), f64::from(b[i].abs())),
                        |(sum, size), x| (sum + x, size + x.abs()),
                    );
                    prop_assert!((f64::from(*z) - sum).abs() <= 4e-6 * size, "{} not {}", z, sum);
                    // In the order that is promised, whatever the processor has.
                    let mut scalar = f64::from(b[i]);
                    for (row, code) in row.chunks(CHUNK).zip(code.chunks(CHUNK)) {
                        let part = row.iter().zip(code).fold(0.0f32, |part, (v, c)| part + c * v);
                        scalar += f64::from(part);
                    }
                    prop_assert_eq!(z.to_bits(), (scalar as f32).to_bits());
                }
            }
        }
    }

    #[test]
    fn many_codes_are_as_few() {
        let (columns, logits, n) = (5, 33, 3 * BATCH + 1);
        let numbers = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
        let matrix = Matrix::new(&numbers(columns * logits), &numbers(logits), columns);
        let codes = numbers(n * columns);
        let (mut all, mut alone) = (vec![0.0; n * logits], vec![0.0; logits]);
        matrix.multiply(&codes, &mut all);
        for (code, z) in codes.chunks(columns).zip(all.chunks(logits)) {
            matrix.multiply(code, &mut alone);
            assert_eq!(z, alone);
        }
    }
}
