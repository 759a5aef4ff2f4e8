//! What is watched while a run is under way.

use std::collections::VecDeque;

use settings::Training;

use crate::folder::Figures;

/// The held-out losses so far: which was the best, and for how long none was better.
///
/// That of step 0 is no candidate, as with transformers: who trains does not want what
/// there was before, and is told if it was better.
pub struct Watch {
    patience: u64,
    /// Loss before the first step.
    pub before: Option<f64>,
    /// Step and loss.
    pub best: Option<(u64, f64)>,
    worse: u64,
}

impl Watch {
    /// From the figures that a resumed run has behind it.
    pub fn new(training: &Training, seen: &[Figures]) -> Self {
        let mut watch = Self {
            patience: training.early_stopping_patience,
            before: None,
            best: None,
            worse: 0,
        };
        for line in seen {
            if let Some(loss) = line.eval_loss {
                watch.see(line.step, loss);
            }
        }
        watch
    }

    /// Takes note of an evaluation; whether it is the best so far.
    pub fn see(&mut self, step: u64, loss: f64) -> bool {
        if step == 0 {
            self.before = Some(loss);
            return false;
        }
        let better = self.best.is_none_or(|(_, best)| loss < best);
        if better {
            self.best = Some((step, loss));
            self.worse = 0;
        } else {
            self.worse += 1;
        }
        better
    }

    /// Whether patience has run out.
    pub fn gave_up(&self) -> bool {
        self.patience > 0 && self.worse >= self.patience
    }
}

/// Calm steps that a step is held against.
const WINDOW: usize = 32;

/// Fewer say little about how figures scatter.
const FEW: usize = 8;

/// So many spikes of the loss in a row are no bad batch: the weights are spoilt, or other
/// rows came.
const MANY: usize = 20;

/// Losses and gradient norms far above those of the steps before.
///
/// A figure is held against the median of the last 32 calm ones, in deviations of
/// 1.4826 times the median absolute deviation (Hampel's identifier: neither is moved
/// by a few wild figures, and with normal ones this is the standard deviation).
/// Spikes do not enter the history, so a loss that stays high stays one.
///
/// After 20 in a row of the loss, it depends on where it is. Below what the run began with,
/// the weights know more than they did, and other rows than before are at hand (harder ones
/// behind easy ones, with `shuffle: false`): the last 20 become the history. Above that the
/// run is over, unless the loss is falling, for then it may come back: the later half of the
/// last 20 has the lower median. That is no strict test, and need not be one: it is put again
/// at every step, and a loss that only scatters soon fails it.
///
/// The deviation is taken as 5% of the median at least, for figures that hardly scatter,
/// and 20% while there are fewer than eight of them. A gradient is no spike as long
/// as `max_grad_norm` lets it through as it is.
///
/// A factor of 10 told of none in 3,540 steps of 18 ordinary runs of the demo (batches of
/// 1, 4 and 16 rows, rates of 3e-4 and 3e-3, three seeds; 2026-11-23).
///
/// It is all a function of metrics.jsonl, so that an interrupted run stops where an
/// uninterrupted one does.
pub struct Spikes {
    factor: f64,
    max_grad_norm: f64,
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
    /// The losses of the first calm steps, as many as say what the run began with.
    first: Vec<f64>,
    /// Steps with a spike of either up to now, without a calm one between.
    row: u64,
    /// The same of the loss alone: losses and gradient norms.
    high: Vec<(f64, f64)>,
    /// Rows of spikes so far: the first step of each.
    pub seen: Vec<u64>,
}

/// Something to tell about a step.
#[derive(Debug, PartialEq)]
pub struct Spike {
    /// `loss` or `gradient norm`.
    pub what: &'static str,
    /// What it is.
    pub value: f64,
    /// Median of the calm steps before.
    pub median: f64,
}

impl Spikes {
    /// From the figures that a resumed run has behind it.
    pub fn new(training: &Training, seen: &[Figures]) -> Self {
        let mut spikes = Self {
            factor: training.spike_factor,
            max_grad_norm: training.max_grad_norm,
            losses: VecDeque::new(),
            norms: VecDeque::new(),
            first: Vec::new(),
            row: 0,
            high: Vec::new(),
            seen: Vec::new(),
        };
        for line in seen {
            if let (Some(loss), Some(norm)) = (line.loss, line.grad_norm) {
                spikes.see(line.step, loss, norm);
            }
        }
        spikes
    }

    /// Takes note of a step; the first of a row of spikes is something to tell.
    pub fn see(&mut self, step: u64, loss: f64, grad_norm: f64) -> Option<Spike> {
        if self.factor == 0.0 {
            return None;
        }
        let of_loss = above(&self.losses, loss, self.factor).map(|median| Spike {
            what: "loss",
            value: loss,
            median,
        });
        let of_norm = above(&self.norms, grad_norm, self.factor)
            .filter(|_| grad_norm > self.max_grad_norm)
            .map(|median| Spike {
                what: "gradient norm",
                value: grad_norm,
                median,
            });
        match of_loss {
            Some(_) => self.high.push((loss, grad_norm)),
            None => self.high.clear(),
        }
        let Some(spike) = of_loss.or(of_norm) else {
            self.row = 0;
            if self.first.len() < FEW {
                self.first.push(loss);
            }
            self.remember(loss, grad_norm);
            return None;
        };
        self.row += 1;
        let first = self.row == 1;
        if first {
            self.seen.push(step);
        }
        self.take_over();
        first.then_some(spike)
    }

    /// Takes a step into the history.
    fn remember(&mut self, loss: f64, grad_norm: f64) {
        for (window, value) in [(&mut self.losses, loss), (&mut self.norms, grad_norm)] {
            if window.len() == WINDOW {
                window.pop_front();
            }
            window.push_back(value);
        }
    }

    /// Begins the history anew with a row of spikes below what the run began with.
    fn take_over(&mut self) {
        let began = self.first.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let Some(last) = self.high.last_chunk::<MANY>().copied() else {
            return;
        };
        if median(last.map(|(loss, _)| loss)) > began {
            return;
        }
        self.losses.clear();
        self.norms.clear();
        for (loss, grad_norm) in last {
            self.remember(loss, grad_norm);
        }
        self.high.clear();
        self.row = 0;
    }

    /// Whether the last step was a spike.
    pub fn under_way(&self) -> bool {
        self.row > 0
    }

    /// For how many steps the loss has been far above the median of the calm steps
    /// before, and that median, once it is too many and the loss is not falling.
    pub fn diverged(&self) -> Option<(usize, f64)> {
        let last = self.high.last_chunk::<MANY>()?;
        let (earlier, later) = last.split_at(MANY / 2);
        let [earlier, later] = [earlier, later].map(|half| median(half.iter().map(|step| step.0)));
        (later >= earlier).then(|| (self.high.len(), median(self.losses.iter().copied())))
    }
}

/// The median of `before`, if `value` is more than `factor` deviations above it.
fn above(before: &VecDeque<f64>, value: f64, factor: f64) -> Option<f64> {
    if before.is_empty() {
        return None;
    }
    let middle = median(before.iter().copied());
    let scatter = 1.4826 * median(before.iter().map(|x| (x - middle).abs()));
    let least = if before.len() < FEW { 0.2 } else { 0.05 } * middle;
    (value > middle + factor * scatter.max(least)).then_some(middle)
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Whether a run would be ended, by the losses of its steps: at which.
    fn ends(losses: impl IntoIterator<Item = f64>) -> Option<u64> {
        let mut watched = spikes();
        (1..).zip(losses).find_map(|(step, loss)| {
            watched.see(step, loss, 0.5);
            watched.diverged().map(|_| step)
        })
    }

    /// A little up and down, as losses are.
    fn noisy(loss: f64, step: u32) -> f64 {
        loss * (1.0 + 0.03 * f64::from(step).sin())
    }

    /// Learnt by heart within 40 steps.
    fn easy_rows() -> impl Iterator<Item = f64> {
        (0..40).map(|step| noisy(11.0 * 0.8_f64.powi(step as i32), step))
    }

    #[test]
    fn harder_rows_are_no_divergence() {
        // They are learnt a little, and no further: 12 at first, 9 from the 30th step on.
        let hard = (0..300).map(|step| noisy(12.0 - 0.1 * f64::from(step.min(30)), step));
        assert_eq!(ends(easy_rows().chain(hard.clone())), None);
        // Afterwards theirs is the level that a step is held against.
        let mut watched = spikes();
        for (step, loss) in (1..).zip(easy_rows().chain(hard)) {
            watched.see(step, loss, 0.5);
        }
        assert_eq!(
            (watched.under_way(), watched.seen.clone()),
            (false, vec![41])
        );
        assert_eq!(watched.see(341, 13.0, 0.5), None);
        assert!(watched.see(342, 40.0, 0.5).is_some());
        // Beyond what the run began with there is nothing that anyone learnt.
        let spoilt = (0..100).map(|step| noisy(12.0, step));
        let step = ends(easy_rows().chain(spoilt)).unwrap();
        assert!((60..70).contains(&step), "{step}");
    }

    #[test]
    fn a_loss_that_falls_is_waited_for() {
        let calm = (0..40).map(|step| noisy(2.0, step));
        let falls = (0..60).map(|step| noisy(15.0 - 0.1 * f64::from(step), step));
        assert_eq!(ends(calm.clone().chain(falls.clone())), None);
        // Where it stays, it will not come back.
        let stays = (0..40).map(|step| noisy(9.0, step));
        let step = ends(calm.chain(falls).chain(stays)).unwrap();
        assert!((101..130).contains(&step), "{step}");
    }

    #[test]
    fn the_loss_before_the_first_step_is_not_the_best() {
        let mut watch = Watch::new(&Training::default(), &[]);
        assert!(!watch.see(0, 1.0));
        assert!(watch.see(4, 3.0) && !watch.see(8, 4.0));
        assert_eq!((watch.before, watch.best), (Some(1.0), Some((4, 3.0))));
    }

    fn spikes() -> Spikes {
        Spikes::new(&Training::default(), &[])
    }

    #[test]
    fn a_figure_is_a_spike_from_its_factor_of_deviations_on() {
        // 1, 2, …, 9: median 5, median absolute deviation 2; 5 + 10·1.4826·2 = 34.652.
        let before: VecDeque<f64> = (1..=9).map(f64::from).collect();
        assert_eq!(above(&before, 34.6, 10.0), None);
        assert_eq!(above(&before, 34.7, 10.0), Some(5.0));
        // All the same: 5% of the median is the deviation, or 20% of a few.
        let same = |n| VecDeque::from(vec![2.0; n]);
        assert_eq!(above(&same(8), 2.99, 10.0), None);
        assert_eq!(above(&same(8), 3.01, 10.0), Some(2.0));
        assert_eq!(above(&same(7), 5.99, 10.0), None);
        assert_eq!(above(&same(7), 6.01, 10.0), Some(2.0));
        assert_eq!(above(&same(0), 1e9, 10.0), None);
    }

    #[test]
    fn a_row_of_spikes_is_told_once_and_too_long_a_row_is_divergence() {
        let mut watched = spikes();
        for step in 1..=40 {
            assert_eq!(watched.see(step, 2.0 + 0.01 * (step % 5) as f64, 0.5), None);
        }
        assert_eq!(watched.see(41, 9.0, 0.5).map(|s| s.what), Some("loss"));
        for step in 42..=60 {
            assert!(watched.diverged().is_none());
            assert_eq!(watched.see(step, 9.0, 0.5), None, "told already");
        }
        assert_eq!(watched.diverged(), Some((20, 2.02)));
        // Had a calm step come between, it would be another row.
        watched.see(61, 2.0, 0.5);
        assert!(watched.diverged().is_none() && !watched.under_way());
        assert!(watched.see(62, 9.0, 0.5).is_some());
        assert_eq!(watched.seen, [41, 62]);
    }

    #[test]
    fn a_gradient_that_is_not_clipped_is_none() {
        let mut watched = spikes();
        for step in 1..=40 {
            watched.see(step, 2.0, 0.05);
        }
        assert_eq!(watched.see(41, 2.0, 0.9), None, "below max_grad_norm");
        assert_eq!(
            watched.see(42, 2.0, 30.0).map(|s| s.what),
            Some("gradient norm")
        );
        for step in 43..=100 {
            watched.see(step, 2.0, 30.0);
        }
        assert!(watched.diverged().is_none(), "the loss is as it was");
    }

    #[test]
    fn a_resumed_run_remembers_what_the_whole_one_does() {
        let mut whole = spikes();
        let mut lines = Vec::new();
        for step in 1..=70 {
            let loss = if (30..35).contains(&step) || step > 60 {
                20.0
            } else {
                3.0
            };
            whole.see(step, loss, 1.0);
            lines.push(Figures {
                step,
                loss: Some(loss),
                grad_norm: Some(1.0),
                eval_loss: None,
            });
        }
        let mut resumed = Spikes::new(&Training::default(), &lines);
        assert_eq!((resumed.row, resumed.seen.clone()), (10, vec![30, 61]));
        for step in 71..=80 {
            assert_eq!(whole.see(step, 20.0, 1.0), resumed.see(step, 20.0, 1.0));
            assert_eq!(whole.diverged(), resumed.diverged());
        }
        assert_eq!(resumed.diverged(), Some((20, 3.0)));
    }

    #[test]
    fn zero_watches_for_none() {
        let training = Training {
            spike_factor: 0.0,
            ..Training::default()
        };
        let mut watched = Spikes::new(&training, &[]);
        for step in 1..100 {
            assert_eq!(watched.see(step, 2f64.powi(step as i32), 1e9), None);
        }
        assert!(watched.diverged().is_none());
    }
}
