//! phi: the logits of documents to their weights. Those of `sigmoid` and `softmax` are positive, each group's K
//! summing to 1; those of `linear` have any sign and size.
//!
//! In f32, within 1e-6 of phi in f64; exp is made of plain sums and products, so that every processor gives the same
//! bits, for a document alone or among others.

use multiversion::multiversion;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phi {
    /// sigmoid(z_k) / sum of sigmoid(z_j)
    Sigmoid,
    /// exp(z_k) / sum of exp(z_j)
    Softmax,
    /// (1 + z_k) / K
    Linear,
}

impl Phi {
    /// Whether the largest logits of a group can stand for all of it: not where small ones are negative weights.
    pub(crate) fn takes_top_k(self) -> bool {
        self != Self::Linear
    }
}

/// w = phi(z) for every group of `experts` logits, in place.
///
/// With `top_k`, the k largest logits of a group stay (among equals the first) and share the whole weight; `linear`
/// has none.
pub fn route_weights(phi: Phi, top_k: Option<u32>, experts: usize, logits: &mut [f32]) {
    let experts = experts.max(1);
    let keep = top_k.map_or(experts, |k| k as usize).min(experts);
    if keep < experts && phi.takes_top_k() {
        drop_others(keep, experts, logits);
    }
    match phi {
        Phi::Sigmoid => sigmoid(experts, logits),
        Phi::Softmax => softmax(experts, logits),
        Phi::Linear => linear(experts, logits),
    }
}

/// Sets all but the `keep` largest of each group to -inf, of which the weight is 0.
fn drop_others(keep: usize, experts: usize, logits: &mut [f32]) {
    // Ordered as `f32::total_cmp` does.
    let key = |z: f32| {
        let bits = z.to_bits().cast_signed();
        bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed()
    };
    let mut keys = Vec::with_capacity(experts);
    for group in logits.chunks_exact_mut(experts) {
        keys.clear();
        keys.extend(group.iter().copied().map(key));
        let Some(last) = keep.checked_sub(1) else {
            group.fill(f32::NEG_INFINITY);
            continue;
        };
        let (above, least, _) = keys.select_nth_unstable_by(last, |a, b| b.cmp(a));
        let least = *least;
        let mut equals = keep - above.iter().filter(|k| **k > least).count();
        for z in group {
            let k = key(*z);
            if k == least && equals > 0 {
                equals -= 1;
            } else if k <= least {
                *z = f32::NEG_INFINITY;
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn sigmoid(experts: usize, logits: &mut [f32]) {
    weigh(
        experts,
        logits,
        |largest| largest.min(0.0),
        |z, largest| {
            // exp(log sigmoid(z) - largest), where `largest` is log sigmoid of the largest logit but for its denominator, which
            // is from 1 to 2: a group of very small sigmoids is no 0/0.
            exp(least(z, 0.0) - largest) / (1.0 + exp(-z.abs()))
        },
    );
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn softmax(experts: usize, logits: &mut [f32]) {
    weigh(
        experts,
        logits,
        |largest| largest,
        |z, largest| exp(z - largest),
    );
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi2", "x86_64+avx2"))]
fn linear(experts: usize, logits: &mut [f32]) {
    let experts = experts as f32;
    for z in logits {
        *z = (1.0 + *z) / experts;
    }
}

/// Numbers on which each step is taken before the next.
const BLOCK: usize = 1024;

/// `weight` of each logit and `of_group` of the largest of its group; then each group divided by its sum.
#[inline(always)]
fn weigh(
    experts: usize,
    logits: &mut [f32],
    of_group: impl Fn(f32) -> f32,
    weight: impl Fn(f32, f32) -> f32,
) {
    let block = (BLOCK / experts).max(1) * experts;
    // What belongs to a group, once for each of its numbers: so the long loops do not know of groups.
    let mut spread = vec![0.0; block.min(logits.len())];
    for numbers in logits.chunks_mut(block) {
        for (group, spread) in numbers.chunks(experts).zip(spread.chunks_mut(experts)) {
            spread.fill(of_group(largest(group)));
        }
        for (z, of_group) in numbers.iter_mut().zip(&spread) {
            *z = weight(*z, *of_group);
        }
        for (group, spread) in numbers.chunks(experts).zip(spread.chunks_mut(experts)) {
            spread.fill((1.0 / sum(group)) as f32);
        }
        for (w, scale) in numbers.iter_mut().zip(&spread) {
            *w *= scale;
        }
    }
}

/// Results that are kept side by side, so that none waits for the one before.
const WAYS: usize = 4;

#[inline(always)]
fn largest(group: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (whole, rest) = group.as_chunks::<WAYS>();
    let mut largest = [f32::NEG_INFINITY; WAYS];
    for zs in whole {
        for (largest, z) in largest.iter_mut().zip(zs) {
            *largest = larger(*largest, *z);
        }
    }
    let all = largest.iter().chain(rest).copied();
    all.fold(f32::NEG_INFINITY, larger)
}

/// In f64: a group may have 65,535 numbers.
#[inline(always)]
fn sum(group: &[f32]) -> f64 {
    let (whole, rest) = group.as_chunks::<WAYS>();
    let mut sums = [0.0f64; WAYS];
    for ws in whole {
        for (sum, w) in sums.iter_mut().zip(ws) {
            *sum += f64::from(*w);
        }
    }
    let rest = rest.iter().copied().map(f64::from);
    rest.fold(sums.iter().sum(), |sum, w| sum + w)
}

/// As `f32::min`, in one instruction.
#[inline(always)]
fn least(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// exp(x) for x <= 0, within 2e-7 of it relatively; 0 below -87, where it is less than 2e-38.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by the polynomial of Cephes (Moshier's expf).
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of so few bits that its products are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2.0 - n * LN_2.1;
    let p = 1.987_569_2e-4 * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_66;
    let p = p * r + 0.5;
    let exp_r = p * (r * r) + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x >= -87.0 { exp_r * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn exp_is_that_of_f64() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(x < -87.0 || error <= 2e-7, "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([-87.1, -1e30, f32::NEG_INFINITY].map(exp), [0.0; 3]);
    }

    /// In f64, by sorting.
    fn reference(phi: Phi, keep: usize, group: &[f32]) -> Vec<f64> {
        if phi == Phi::Linear {
            let weight = |z: &f32| (1.0 + f64::from(*z)) / group.len() as f64;
            return group.iter().map(weight).collect();
        }
        let mut order: Vec<usize> = (0..group.len()).collect();
        order.sort_by(|a, b| group[*b].total_cmp(&group[*a]));
        let mut logs = vec![f64::NEG_INFINITY; group.len()];
        for i in &order[..keep] {
            let z = f64::from(group[*i]);
            logs[*i] = match phi {
                Phi::Sigmoid => z.min(0.0) - (-z.abs()).exp().ln_1p(),
                Phi::Softmax | Phi::Linear => z,
            };
        }
        let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logs.iter().map(|log| (log - largest).exp()).sum();
        logs.iter().map(|log| (log - largest).exp() / sum).collect()
    }

    fn groups() -> impl Strategy<Value = (usize, Vec<f32>)> {
        let number = prop_oneof![
            8 => -12.0f32..12.0,
            2 => -1000.0f32..1000.0,
            1 => prop_oneof![Just(0.0f32), Just(-0.0), Just(1e-40), Just(f32::MAX), Just(f32::MIN), Just(-95.5)],
            2 => (-3i8..3).prop_map(f32::from),
        ];
        // Groups that are small as a whole, too.
        let shift = prop_oneof![3 => Just(0.0f32), 1 => Just(-200.0), 1 => Just(-4000.0)];
        (1usize..40, 1usize..60, shift).prop_flat_map(move |(experts, groups, shift)| {
            let number = number
                .clone()
                .prop_map(move |z| (z + shift).clamp(f32::MIN, f32::MAX));
            (
                Just(experts),
                prop::collection::vec(number, experts * groups),
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn weights_are_those_of_f64_and_of_the_same_bits_in_any_company(
            (experts, z) in groups(),
            phi in prop::sample::select(vec![Phi::Sigmoid, Phi::Softmax, Phi::Linear]),
            top_k in prop::option::of(1u32..40),
        ) {
            let top_k = top_k.filter(|_| phi.takes_top_k());
            let keep = top_k.map_or(experts, |k| k as usize).min(experts);
            let mut all = z.clone();
            route_weights(phi, top_k, experts, &mut all);
            for (z, w) in z.chunks(experts).zip(all.chunks(experts)) {
                let mut alone = z.to_vec();
                route_weights(phi, top_k, experts, &mut alone);
                prop_assert_eq!(w, &alone);
                for ((w, expected), z) in w.iter().zip(reference(phi, keep, z)).zip(z) {
                    let bound = 1e-6 * expected.abs().max(1.0);
                    prop_assert!((f64::from(*w) - expected).abs() <= bound, "{} is {}, not {}", z, w, expected);
                }
                prop_assert!(w.iter().filter(|w| **w != 0.0).count() <= keep);
            }
            // As the instructions that every processor of its kind has compute it.
            let mut plain = z;
            if keep < experts {
                drop_others(keep, experts, &mut plain);
            }
            match phi {
                Phi::Softmax => weigh(experts, &mut plain, |l| l, |z, l| super::exp(z - l)),
                Phi::Sigmoid => {
                    weigh(experts, &mut plain, |l| l.min(0.0), |z, l| exp(least(z, 0.0) - l) / (1.0 + exp(-z.abs())));
                }
                Phi::Linear => plain.iter_mut().for_each(|z| *z = (1.0 + *z) / experts as f32),
            }
            prop_assert_eq!(plain, all);
        }

        #[test]
        fn no_number_is_too_strange(bits in prop::collection::vec(any::<u32>(), 1..60), experts in 1usize..9, top_k in 0u32..9) {
            for phi in [Phi::Sigmoid, Phi::Softmax, Phi::Linear] {
                let mut numbers: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
                route_weights(phi, Some(top_k), experts, &mut numbers);
            }
        }
    }

    #[test]
    fn a_large_group_sums_to_one() {
        // Many small weights beside a large one, which a sum in f32 would lose.
        let mut z = vec![-17.0f32; 65_535];
        z[40_000] = 0.0;
        let expected = reference(Phi::Softmax, z.len(), &z);
        route_weights(Phi::Softmax, None, z.len(), &mut z);
        assert!(
            z.iter()
                .zip(expected)
                .all(|(w, e)| (f64::from(*w) - e).abs() <= 1e-6)
        );
    }
}
