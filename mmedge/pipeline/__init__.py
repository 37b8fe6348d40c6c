"""The line: task, baseline, stages, engines, measurements, gates, report. The only place that knows all of them."""
