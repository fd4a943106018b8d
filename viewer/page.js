"use strict";
// Draws the panels of a page: curves that answer to the mouse, over steps, epochs or time.
(() => {
  const { panels, best } = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("panels");
  if (!place) return;
  const controls = document.getElementById("controls");
  if (typeof Plotly === "undefined") {
    document.getElementById("no-plotly").hidden = false;
    controls.hidden = true;
    return;
  }
  const [axis, smoothing, logarithmic] = ["axis", "smoothing", "logarithmic"].map((id) => document.getElementById(id));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const LIGHT_COLOURS = ["#1f66c1", "#c2571a", "#2b8a57", "#8a3fb0", "#a8871d", "#c13a6b", "#3f8c9c", "#6b6f76"];
  const DARK_COLOURS = ["#7db1f5", "#f29e63", "#72cf9b", "#cf9bea", "#e0c56b", "#f08bb0", "#7fcbd8", "#b0b6bf"];
  const TITLES = { step: "step", epoch: "epoch", seconds: "time" };

  // Plotly takes tags and entities in texts for its own; a name is shown as it is.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const shortened = (text) => (text.length > 48 ? `${text.slice(0, 47)}…` : text);

  // The exponential average of what came before, each value weighted as if the average had always run.
  const smoothed = (values, weight) => {
    let mean = 0;
    let norm = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return mean / norm;
    });
  };

  // Steps stay numbers; seconds become hours, minutes and seconds.
  const clock = (seconds) => {
    const whole = Math.round(seconds);
    const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
    return seconds < 10 ? `${seconds.toFixed(1)} s` : parts.map((part) => String(part).padStart(2, "0")).join(":");
  };

  const ticks = (longest) => {
    const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400]
      .find((one) => longest / one <= 6) || 86400 * Math.ceil(longest / 86400 / 6);
    const values = Array.from({ length: Math.floor(longest / step) + 1 }, (_, number) => number * step);
    return { tickvals: values, ticktext: values.map(clock) };
  };

  const drawn = (panel) => {
    const colours = dark.matches ? DARK_COLOURS : LIGHT_COLOURS;
    const weight = Number(smoothing.value);
    const curves = [...panel.curves].sort((one, other) => Number(other.fine) - Number(one.fine));
    return curves.flatMap((curve) => {
      const color = colours[panel.curves.indexOf(curve) % colours.length];
      const x = curve[axis.value];
      const name = plain(shortened(curve.name));
      const look = {
        x, name, type: "scatter", legendgroup: curve.name, mode: x.length > 40 ? "lines" : "lines+markers",
        text: axis.value === "seconds" ? x.map(clock) : undefined, marker: { size: 5, color },
        hovertemplate: "%{y:.6g}",
      };
      const raw = { ...look, y: curve.value, line: { color, width: curve.fine ? 1 : 2 }, opacity: curve.fine ? 0.5 : 1 };
      const traces = weight === 0 ? [raw] : [
        { ...raw, opacity: 0.25, showlegend: false, hoverinfo: "skip", hovertemplate: undefined },
        { ...look, y: smoothed(curve.value, weight), line: { color, width: 2 }, mode: "lines" },
      ];
      if (curve.best) {
        traces.push({
          x: [curve.best[axis.value]], y: [curve.best.value], type: "scatter", mode: "markers", name: `best ${name}`,
          legendgroup: curve.name, showlegend: false, hovertemplate: "best: %{y:.6g}<extra></extra>",
          marker: { symbol: "star", size: 13, color, line: { width: 1, color: dark.matches ? "#14181e" : "#fff" } },
        });
      }
      return traces;
    });
  };

  // Around a constant, such as a learning rate, plotly would draw one unit up and one down.
  const heights = (panel) => {
    const values = panel.curves.flatMap((curve) => curve.value).filter((value) => value !== null);
    const constant = values.length > 0 && values.every((value) => value === values[0]) ? values[0] : 0;
    return constant && !logarithmic.checked ? { range: [Math.min(0, 2 * constant), Math.max(0, 2 * constant)] } : {};
  };

  const layout = (panel) => {
    const style = getComputedStyle(document.documentElement);
    const [ink, line, ground] = ["--ink", "--line", "--panel"].map((name) => style.getPropertyValue(name).trim());
    const longest = Math.max(0, ...panel.curves.map((curve) => curve.seconds[curve.seconds.length - 1] || 0));
    return {
      title: { text: plain(shortened(panel.title)), font: { size: 15 }, x: 0.02, xanchor: "left", y: 0.97, yanchor: "top" },
      margin: { l: 56, r: 14, t: 58, b: 40 },
      paper_bgcolor: ground, plot_bgcolor: ground, font: { color: ink, size: 12 },
      // Several lines of names would cover the title: then they are below.
      legend: innerWidth < 600 && panel.curves.length > 2
        ? { orientation: "h", x: 0, y: -0.25, yanchor: "top", font: { size: 11 } }
        : { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      shapes: best ? [{
        type: "line", x0: best[axis.value], x1: best[axis.value], yref: "paper", y0: 0, y1: 1, layer: "below",
        line: { color: ink, width: 1, dash: "dot" },
      }] : [],
      hovermode: "x unified", hoverlabel: { bgcolor: ground, bordercolor: line, font: { color: ink } },
      xaxis: {
        title: { text: TITLES[axis.value], standoff: 6 }, gridcolor: line, zerolinecolor: line, hoverformat: ".6~g",
        ...(axis.value === "seconds" ? ticks(longest) : {}),
      },
      yaxis: { type: logarithmic.checked ? "log" : "linear", gridcolor: line, zerolinecolor: line, exponentformat: "e", minexponent: 5, ...heights(panel) },
    };
  };

  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const elements = panels.map((panel) => {
    const element = document.createElement("div");
    element.className = "panel";
    place.append(element);
    return element;
  });
  const draw = (number) => Plotly.react(elements[number], drawn(panels[number]), layout(panels[number]), config);
  const drawAll = () => panels.forEach((_, number) => elements[number].data && draw(number));

  // A panel is drawn when it comes into view: a page with hundreds opens as fast as one with few.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(elements.indexOf(entry.target));
    }
  }, { rootMargin: "300px" });
  elements.forEach((element) => seen.observe(element));
  controls.addEventListener("input", drawAll);
  controls.addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", drawAll);
})();
