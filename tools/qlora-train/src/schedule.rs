//! The learning rate of each step, as transformers' `get_scheduler` gives it.

use settings::{Scheduler, Training};

/// Updates of the warm-up, of `steps`; a ratio is rounded up.
pub fn warmup(training: &Training, steps: u64) -> u64 {
    training.warmup_ratio.map_or(training.warmup_steps, |part| {
        (part * steps as f64).ceil() as u64
    })
}

/// Learning rate of update `step`, counted from 1, of `steps`. With a warm-up
/// the first update has rate 0: the rate is that of the updates done so far.
pub fn learning_rate(training: &Training, step: u64, steps: u64) -> f64 {
    let done = step - 1;
    let warmup = warmup(training, steps);
    if done < warmup {
        return training.learning_rate * done as f64 / warmup as f64;
    }
    let progress = (done - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
    training.learning_rate
        * match training.lr_scheduler {
            Scheduler::Constant => 1.0,
            Scheduler::Linear => (1.0 - progress).max(0.0),
            Scheduler::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_of_all_steps_is_rounded_up_as_transformers_does() {
        let training = Training {
            warmup_ratio: Some(0.21),
            warmup_steps: 0,
            ..Training::default()
        };
        let by_ratio = |step| learning_rate(&training, step, 10);
        let training = Training {
            warmup_ratio: None,
            warmup_steps: 3,
            ..Training::default()
        };
        for step in 1..=10 {
            assert_eq!(by_ratio(step), learning_rate(&training, step, 10));
        }
    }

    #[test]
    fn schedules_are_those_of_transformers() {
        // transformers 5.23, get_scheduler(name, lr 2e-4, num_warmup_steps=3,
        // num_training_steps=10), the rate before each of the 10 updates.
        let cosine = [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0001900968867902419,
            0.00016234898018587337,
            0.00012225209339563145,
            7.774790660436858e-05,
            3.7651019814126654e-05,
            9.903113209758096e-06,
        ];
        let linear = [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.00017142857142857143,
            0.00014285714285714287,
            0.00011428571428571428,
            8.571428571428571e-05,
            5.714285714285714e-05,
            2.857142857142857e-05,
        ];
        let constant = [
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
            0.0002,
        ];
        for (lr_scheduler, expected) in [
            (Scheduler::Cosine, cosine),
            (Scheduler::Linear, linear),
            (Scheduler::Constant, constant),
        ] {
            let training = Training {
                lr_scheduler,
                warmup_steps: 3,
                learning_rate: 2e-4,
                ..Training::default()
            };
            for (done, expected) in expected.iter().enumerate() {
                let rate = learning_rate(&training, done as u64 + 1, 10);
                assert!(
                    (rate - expected).abs() <= 1e-15 * expected,
                    "{lr_scheduler:?} {done}: {rate} {expected}"
                );
            }
        }
    }
}
