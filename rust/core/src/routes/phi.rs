//! phi: the logits of one document to its weights, each group's K summing to 1.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phi {
    /// sigmoid(z_k) / sum of sigmoid(z_j)
    Sigmoid,
    /// exp(z_k) / sum of exp(z_j)
    Softmax,
}

/// w = phi(z) for every group of `experts` logits, in place.
///
/// With `top_k`, the k largest logits of a group stay (among equals the first) and share the whole weight.
pub fn route_weights(phi: Phi, top_k: Option<u32>, experts: usize, logits: &mut [f32]) {
    let keep = top_k.map_or(experts, |k| k as usize).min(experts);
    let mut logs = vec![0.0; experts];
    let mut order: Vec<usize> = Vec::new();
    for group in logits.chunks_exact_mut(experts.max(1)) {
        for (log, z) in logs.iter_mut().zip(group.iter()) {
            let z = f64::from(*z);
            *log = match phi {
                Phi::Sigmoid => log_sigmoid(z),
                Phi::Softmax => z,
            };
        }
        if keep < experts {
            let value = |i: &usize| group.get(*i).copied().unwrap_or(f32::NEG_INFINITY);
            order.clear();
            order.extend(0..experts);
            order.sort_unstable_by(|a, b| value(b).total_cmp(&value(a)).then(a.cmp(b)));
            for dropped in order.iter().skip(keep) {
                if let Some(log) = logs.get_mut(*dropped) {
                    *log = f64::NEG_INFINITY;
                }
            }
        }
        normalise(&logs, group);
    }
}

/// exp(log - logsumexp(logs)): in log space, so that a group of very small sigmoids is not 0/0.
fn normalise(logs: &[f64], weights: &mut [f32]) {
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logs.iter().map(|log| (log - largest).exp()).sum();
    for (w, log) in weights.iter_mut().zip(logs) {
        *w = ((log - largest).exp() / sum) as f32;
    }
}

fn log_sigmoid(z: f64) -> f64 {
    z.min(0.0) - (-z.abs()).exp().ln_1p()
}
