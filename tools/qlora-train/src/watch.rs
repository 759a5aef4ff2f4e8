//! What is watched while a run is under way.

use settings::Training;

/// The held-out losses so far: which was the best, and for how long none was better.
pub struct Watch {
    patience: u64,
    /// Step and loss.
    pub best: Option<(u64, f64)>,
    worse: u64,
}

impl Watch {
    /// From the evaluations that a resumed run has behind it.
    pub fn new(training: &Training, seen: Vec<(u64, f64)>) -> Self {
        let mut watch = Self {
            patience: training.early_stopping_patience,
            best: None,
            worse: 0,
        };
        for (step, loss) in seen {
            watch.see(step, loss);
        }
        watch
    }

    /// Takes note of an evaluation; whether it is the best so far.
    pub fn see(&mut self, step: u64, loss: f64) -> bool {
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
