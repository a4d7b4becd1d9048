"use strict";
(() => {
  const matrices = JSON.parse(document.getElementById("matrices").textContent);
  const layer = document.getElementById("layer");
  const measure = document.getElementById("measure");
  const last = document.getElementById("last");
  const canvas = document.getElementById("heat");
  const reading = document.getElementById("reading");
  const about = document.getElementById("about");
  const names = [...new Set(matrices.map((m) => m.layer))];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // Dark to light on a dark ground and light to dark on a light one, so that strong pairs stand out.
  const ramps = {
    light: [[246, 248, 251], [178, 205, 232], [84, 142, 199], [27, 74, 138], [8, 26, 66]],
    dark: [[27, 32, 39], [38, 66, 105], [58, 122, 176], [140, 196, 205], [250, 244, 190]],
  };
  let shown = null;

  const ramp = () => ramps[dark.matches ? "dark" : "light"];
  const colour = (share) => {
    const stops = ramp();
    const at = share * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
  };

  const decoded = (m) => {
    const size = m.channels.length;
    const bytes = Uint8Array.from(atob(m.values), (c) => c.charCodeAt(0));
    const full = new Uint8Array(size * size);
    let next = 0;
    for (let i = 0; i < size; i++) {
      for (let j = i + 1; j < size; j++) {
        full[i * size + j] = full[j * size + i] = bytes[next++];
      }
    }
    return full;
  };

  const chosen = () => matrices.find((m) => m.layer === names[layer.value] && m.measure === measure.value);

  const draw = () => {
    const m = chosen();
    if (!m) return;
    const size = m.channels.length;
    const gone = new Set(m.removed);
    const order = m.channels.map((_, place) => place);
    if (last.checked) order.sort((a, b) => gone.has(a) - gone.has(b) || a - b);
    shown = { m, gone, order, full: decoded(m), cell: Math.max(2, Math.floor(512 / size)) };
    const { full, cell } = shown;
    shown.margin = 12;
    canvas.width = canvas.height = shown.margin + 2 + size * cell;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const mark = getComputedStyle(document.documentElement).getPropertyValue("--mark");
    const start = shown.margin + 2;
    order.forEach((one, row) => {
      order.forEach((other, column) => {
        const value = one === other ? 1 : full[one * size + other] / 255;
        context.fillStyle = `rgb(${colour(value).join(" ")})`;
        context.fillRect(start + column * cell, start + row * cell, cell, cell);
      });
      if (gone.has(one)) {
        context.fillStyle = mark;
        context.fillRect(0, start + row * cell, shown.margin, cell);
        context.fillRect(start + row * cell, 0, cell, shown.margin);
      }
    });
    const text = `${m.layer}: ${gone.size} of ${size} channels removed` +
      (size < m.width ? ` (${size} of ${m.width} channels are shown)` : "");
    about.textContent = text;
    canvas.setAttribute("aria-label", `Correlation matrix. ${text}`);
    canvas.dataset.layer = m.layer;
    canvas.dataset.measure = m.measure;
    canvas.dataset.removed = m.removed.map((place) => m.channels[place]).join(",");
    reading.textContent = "Point at a cell, or touch one, to read it.";
    // A page shown inside another one has no address to change.
    if (/^(file|https?):$/.test(location.protocol)) history.replaceState(null, "", `#correlation=${layer.value}`);
  };

  const read = (event) => {
    if (!shown) return;
    const { m, gone, order, full, cell, margin } = shown;
    const size = order.length;
    const box = canvas.getBoundingClientRect();
    const place = (at) => Math.floor((at * canvas.width / box.width - margin - 2) / cell);
    const row = order[place(event.clientY - box.top)];
    const column = order[place(event.clientX - box.left)];
    if (row === undefined || column === undefined) return;
    const named = (i) => `channel ${m.channels[i]}${gone.has(i) ? " (removed)" : ""}`;
    const value = row === column ? 1 : full[row * size + column] / 255;
    reading.textContent = `${named(row)} and ${named(column)}: ${value.toFixed(2)}`;
  };

  const offer = () => {
    const found = matrices.filter((m) => m.layer === names[layer.value]).map((m) => m.measure);
    for (const option of measure.options) option.disabled = !found.includes(option.value);
    if (!found.includes(measure.value)) measure.value = found[0];
    draw();
  };

  const paint = () => {
    const context = document.getElementById("ramp").getContext("2d");
    for (let x = 0; x < 128; x++) {
      context.fillStyle = `rgb(${colour(x / 127).join(" ")})`;
      context.fillRect(x, 0, 1, 8);
    }
  };

  names.forEach((name, place) => {
    const gone = matrices.find((m) => m.layer === name).removed.length;
    layer.add(new Option(`${name} (${gone} removed)`, place));
  });
  const wanted = /^#correlation=(\d+)$/.exec(location.hash);
  const most = (m) => m.removed.length;
  const first = matrices.reduce((best, m) => (most(m) > most(best) ? m : best), matrices[0]);
  layer.value = wanted && names[wanted[1]] !== undefined ? wanted[1] : names.indexOf(first.layer);
  measure.value = matrices.some((m) => m.measure === "activations") ? "activations" : "weights";
  layer.addEventListener("change", offer);
  measure.addEventListener("change", draw);
  last.addEventListener("change", draw);
  canvas.addEventListener("pointermove", read);
  canvas.addEventListener("pointerdown", read);
  dark.addEventListener("change", () => { paint(); draw(); });
  document.getElementById("chooser").hidden = false;
  paint();
  offer();
})();
