//! Margins and weights of the rows' own: what they come to beside the reference, which the property tests compare with.

use partialfc::options::{HeadOptions, Placement};
use partialfc_testing::capi::{options, Device, Head, Outcome, Rows};
use partialfc_testing::numbers::{assert_close, widen, Random};
use partialfc_testing::ranks::{on_ranks, Rank};
use partialfc_testing::training::{assert_same_bits, batch_rows, learning_rate, Batch, Trace};

type Terms = [Option<Vec<f32>>; 3];

const NONE: Terms = [None, None, None];

fn heads() -> Vec<HeadOptions> {
    let base = HeadOptions { sample_rate: 0.5, row_terms: true, ..options(37, 9, 8) };
    [Placement::Sharded, Placement::Replicated].map(|placement| HeadOptions { placement, ..base.clone() }).to_vec()
}

fn all(rows: usize, value: f32) -> Option<Vec<f32>> {
    Some(vec![value; rows])
}

/// Different ones for each row, rank and step.
fn terms_of(rank: usize, step: usize, rows: usize) -> Terms {
    let mut random = Random(77 + 10 * rank as u64 + step as u64);
    [(-0.3, 0.7), (0.0, 0.4), (0.0, 2.0)].map(|(from, to)| Some((0..rows).map(|_| random.between(from, to) as f32).collect()))
}

/// Steps of which `forward` makes the first part; the gradients of m2 and m3 beside the trace.
fn train(
    place: &Rank,
    options: &HeadOptions,
    forward: impl Fn(&mut Head, usize, &Batch) -> Outcome<f64>,
) -> (Trace, Vec<[Vec<f32>; 2]>) {
    let mut head = Head::new(&Device::under_test(2), &place.comm, options);
    let (mut trace, mut margins) = (Trace::default(), Vec::new());
    for step in 0..3 {
        let batch = Batch::draw(options, place.rank, step, batch_rows(options, place.rank, step));
        let mut grad = Rows::output(batch.labels.len(), head.dim);
        let loss = forward(&mut head, step, &batch).expect("forward");
        match options.row_terms {
            true => margins.push(head.backward_with(1.0, 1.0, &mut grad).expect("backward")),
            false => head.backward(1.0, 1.0, &mut grad).expect("backward"),
        }
        let sample = head.sample_ids().expect("the sample");
        head.update(learning_rate(step)).expect("update");
        trace.saw_step(loss, &grad, sample);
    }
    trace.saw_rows(&mut head, options);
    (trace, margins)
}

fn traces(runs: Vec<(Trace, Vec<[Vec<f32>; 2]>)>) -> Vec<Trace> {
    runs.into_iter().map(|(trace, _)| trace).collect()
}

#[test]
fn what_is_not_given_is_that_of_the_options() {
    for options in heads() {
        let plain = traces(on_ranks(2, |place| train(place, &options, |head, _, b| head.forward(&mut b.rows(9), Some(&b.labels)))));
        for given in [false, true] {
            let with = on_ranks(2, |place| {
                train(place, &options, |head, _, b| {
                    let rows = b.labels.len();
                    let (m2, m3) = (options.margin.m2 as f32, options.margin.m3 as f32);
                    // One rank gives what the other leaves out.
                    let terms = match given == (place.rank == 0) {
                        true => [all(rows, m2), all(rows, m3), all(rows, 1.0)],
                        false => NONE,
                    };
                    head.forward_with(&mut b.rows(9), Some(&b.labels), &terms)
                })
            });
            assert_same_bits(&format!("{:?}", options.placement), &traces(with), &plain);
        }
        // A head that is not made for it finds the logits before they travel, and rounds them elsewhere.
        let off = HeadOptions { row_terms: false, ..options.clone() };
        let off = traces(on_ranks(2, |place| train(place, &off, |head, _, b| head.forward(&mut b.rows(9), Some(&b.labels)))));
        for (on, off) in plain.iter().zip(&off) {
            assert_eq!(on.samples, off.samples);
            assert_close("loss", &on.losses(), &off.losses(), 1e-6);
            assert_close("dE", &on.grads(), &off.grads(), 1e-5);
            assert_close("W", &on.centers(), &off.centers(), 1e-6);
        }
    }
}

#[test]
fn a_prepared_step_takes_them_too() {
    for options in heads() {
        let run = |prepared: bool| {
            on_ranks(2, |place| {
                train(place, &options, |head, step, b| {
                    let terms = terms_of(place.rank, step, b.labels.len());
                    if prepared {
                        head.prepare(&b.labels)?;
                    }
                    head.forward_with(&mut b.rows(9), (!prepared).then_some(&b.labels), &terms)
                })
            })
        };
        let (early, late) = (run(true), run(false));
        for (early, late) in early.iter().zip(&late) {
            assert_eq!(early.1, late.1, "gradients of the margins");
        }
        assert_same_bits(&format!("{:?}", options.placement), &traces(early), &traces(late));
    }
}

/// The same rows on one rank and on three give the same numbers: the terms find their rows.
#[test]
fn terms_travel_with_their_rows() {
    const ROWS: usize = 6;
    for options in heads() {
        let options = HeadOptions { sample_rate: 1.0, max_batch: ROWS as u64, ..options };
        let batch = Batch::draw(&options, 0, 0, ROWS);
        let terms = terms_of(0, 0, ROWS);
        let run = |ranks: usize| {
            let found = on_ranks(ranks, |place| {
                let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
                let own = place.rank * ROWS / ranks..(place.rank + 1) * ROWS / ranks;
                let mut rows = Rows::f32(&batch.embeddings[own.start * 9..own.end * 9], 9);
                let terms = terms.each_ref().map(|terms| terms.as_ref().map(|terms| terms[own.clone()].to_vec()));
                let loss = head.forward_with(&mut rows, Some(&batch.labels[own.clone()]), &terms).expect("forward");
                let mut grad = Rows::output(own.len(), 9);
                let margins = head.backward_with(0.5, 4.0, &mut grad).expect("backward");
                (loss, grad.values(), margins)
            });
            let of = |number: usize| found.iter().flat_map(|(_, _, margins)| widen(&margins[number])).collect::<Vec<f64>>();
            (found[0].0, found.iter().flat_map(|(_, grad, _)| grad.clone()).collect::<Vec<f64>>(), of(0), of(1))
        };
        let (alone, together) = (run(1), run(3));
        assert_close("loss", &[together.0], &[alone.0], 1e-6);
        assert_close("dE", &together.1, &alone.1, 1e-5);
        assert_close("dm2", &together.2, &alone.2, 1e-5);
        assert_close("dm3", &together.3, &alone.3, 1e-5);
    }
}

/// The loss falls where the margins go down their gradients, by what these say.
#[test]
fn margins_can_be_learned() {
    for options in heads() {
        let options = HeadOptions { sample_rate: 1.0, gradient_scale: 2.0, ..options };
        on_ranks(2, |place| {
            let mut head = Head::new(&Device::under_test(1), &place.comm, &options);
            let batch = Batch::draw(&options, place.rank, 0, 5);
            let [m2, m3, weight] = terms_of(place.rank, 0, 5).map(|terms| terms.expect("all are given"));
            let loss = |head: &mut Head, by: [f32; 2]| {
                // Of one row of rank 1 alone.
                let (mut m2, mut m3) = (m2.clone(), m3.clone());
                if place.rank == 1 {
                    (m2[2], m3[2]) = (m2[2] + by[0], m3[2] + by[1]);
                }
                head.forward_with(&mut batch.rows(9), Some(&batch.labels), &[Some(m2), Some(m3), Some(weight.clone())])
                    .expect("forward")
            };
            let h = 1.0 / 64.0;
            let slopes: Vec<f64> = [[h, 0.0], [0.0, h]]
                .map(|by| (loss(&mut head, by) - loss(&mut head, by.map(|by| -by))) / (2.0 * f64::from(h)))
                .to_vec();
            loss(&mut head, [0.0; 2]);
            let margins = head.backward_with(0.5, 3.0, &mut Rows::output(5, 9)).expect("backward");
            if place.rank == 1 {
                let found: Vec<f64> = margins.iter().map(|of| f64::from(of[2]) / (0.5 * 3.0 * 2.0)).collect();
                assert_close("slopes", &found, &slopes, 5e-3);
            }
        });
    }
}

/// A row of weight 0 is one of the valid rows, and does nothing else.
#[test]
fn a_row_without_weight_has_no_gradient() {
    for options in heads() {
        let options = HeadOptions { ignore_label: Some(-1), ..options };
        let run = |ignored: bool| {
            on_ranks(2, |place| {
                train(place, &options, |head, step, b| {
                    // The sample stays the same: other rows have the class, too.
                    let (mut labels, mut weight) = (vec![3; b.labels.len()], vec![1.0; b.labels.len()]);
                    match ignored {
                        true => labels[step] = -1,
                        false => weight[step] = 0.0,
                    }
                    let loss = head.forward_with(&mut b.rows(9), Some(&labels), &[None, None, Some(weight)])?;
                    // The mean is over all of them.
                    let valid = head.last_metrics()?.valid_rows;
                    Ok(loss * valid as f64)
                })
            })
        };
        let (ignored, weightless) = (run(true), run(false));
        for (rank, ((left_out, _), (weightless, margins))) in ignored.iter().zip(&weightless).enumerate() {
            assert_close("sum of the losses", &weightless.losses()[..1], &left_out.losses()[..1], 1e-6);
            for (step, of_step) in margins.iter().enumerate() {
                assert!(of_step.iter().all(|of| of.get(step) == Some(&0.0)), "rank {rank}: {of_step:?}");
                assert!(weightless.grads[step][step * 9..(step + 1) * 9].iter().all(|&bits| f32::from_bits(bits) == 0.0));
            }
        }
    }
}
