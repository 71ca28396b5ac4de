// The page and, in a worker of its own so that the page never freezes, the model: this one script is both.
"use strict";

// ---------------------------------------------------------------------------------------------------------------------
// From a picture to the model's input: what timm's evaluation transform does, with Pillow's resampling.
//
// A browser's own resizing differs from Pillow's, and each browser's is another; benchmarks/README.md says how far that
// takes the answers. So the pixels are read as they are and resampled here, in Pillow's arithmetic: the filter is widened
// by the scale, its weights are rounded to 22 bits, and one direction is rounded to 8 bits before the other.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  // name: [support, weight of the distance x]
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
  }],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const ONE = 2 ** 22;

// For each of `count` output pixels from `first`: where its input pixels begin, and their weights.
function taps(inSize, outSize, first, count, filter) {
  const scale = inSize / outSize;
  if (filter === "nearest" || scale === 1) {
    const nearest = [];
    for (let i = 0, at = scale / 2; i < outSize; i++, at += scale) nearest.push(Math.trunc(at)); // added up, as Pillow does
    return Array.from({ length: count }, (_, i) => {
      const from = nearest[first + i];
      return from === undefined ? { from: 0, weights: [] } : { from, weights: [ONE] };
    });
  }
  const [reach, weight] = FILTERS[filter];
  const stretch = Math.max(scale, 1);
  const support = reach * stretch;
  return Array.from({ length: count }, (_, i) => {
    if (first + i < 0 || first + i >= outSize) return { from: 0, weights: [] }; // outside the picture: padding
    const center = (first + i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - support + 0.5));
    const to = Math.min(inSize, Math.trunc(center + support + 0.5));
    const raw = [];
    for (let x = from; x < to; x++) raw.push(weight((x - center + 0.5) * (1 / stretch)));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { from, weights: raw.map((w) => Math.trunc((w / sum) * ONE + (w < 0 ? -0.5 : 0.5))) };
  });
}

// Python's round(), which takes halves to the even number.
function roundEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

// The size that a picture is resized to, and where in that the model's input lies.
function geometry(width, height, { input_size, scale, crop_mode }) {
  const [, cropHeight, cropWidth] = input_size;
  let size;
  if (crop_mode === "squash") {
    size = [scale[1], scale[0]];
  } else if (crop_mode === "border" || scale[0] !== scale[1]) {
    const ratios = [height / scale[0], width / scale[1]];
    const ratio = crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
    size = [roundEven(width / ratio), roundEven(height / ratio)];
  } else {
    const short = scale[0];
    size = width <= height ? [short, Math.trunc((short * height) / width)] : [Math.trunc((short * width) / height), short];
  }
  // Missing pixels are added on both sides first, the odd one on the right; then the middle is cut out.
  const offset = (have, want) => (want > have ? -Math.floor((want - have) / 2) : roundEven((have - want) / 2));
  const left = offset(size[0], cropWidth);
  const top = offset(size[1], cropHeight);
  return { size, left, top, width: cropWidth, height: cropHeight };
}

const to8bits = (sum) => Math.max(0, Math.min(255, Math.floor((sum + ONE / 2) / ONE)));

// An ImageBitmap as the model takes it: [channels, height, width], normalised.
function preprocess(bitmap, settings) {
  const channels = settings.input_size[0];
  const place = geometry(bitmap.width, bitmap.height, settings);
  const columns = taps(bitmap.width, place.size[0], place.left, place.width, settings.interpolation);
  const rows = taps(bitmap.height, place.size[1], place.top, place.height, settings.interpolation);

  // Along the rows first; along the columns first where that drops many more lines, as in Pillow from version 13.
  const dropped = bitmap.height - place.size[1];
  const tall = dropped > 0 && dropped > 2 * (bitmap.width - place.size[0]);
  const [first, second, length] = tall ? [rows, columns, bitmap.height] : [columns, rows, bitmap.width];
  const used = second.filter((tap) => tap.weights.length);
  const begin = Math.min(...used.map((tap) => tap.from));
  const end = Math.max(...used.map((tap) => tap.from + tap.weights.length));

  // A strip of lines at a time: a whole photograph may be too much for a canvas.
  const stride = first.length * channels;
  const half = new Uint8Array((end - begin) * stride);
  const strip = Math.max(1, Math.min(end - begin, Math.floor(2 ** 20 / length)));
  const [width, height] = tall ? [strip, length] : [length, strip];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  context.imageSmoothingEnabled = false;
  const [step, next] = tall ? [4 * width, 4] : [4, 4 * width]; // from pixel to pixel, and from line to line
  for (let at = begin; at < end; at += strip) {
    context.drawImage(bitmap, tall ? -at : 0, tall ? 0 : -at);
    const pixels = context.getImageData(0, 0, width, height).data;
    if (channels === 1) {
      for (let i = 0; i < pixels.length; i += 4) {
        pixels[i] = (pixels[i] * 19595 + pixels[i + 1] * 38470 + pixels[i + 2] * 7471 + 0x8000) >> 16;
      }
    }
    for (let line = 0; line < Math.min(strip, end - at); line++) {
      let target = (at - begin + line) * stride;
      for (const { from, weights } of first) {
        for (let c = 0; c < channels; c++) {
          let sum = 0;
          let source = line * next + from * step + c;
          for (let k = 0; k < weights.length; k++, source += step) sum += pixels[source] * weights[k];
          half[target++] = to8bits(sum);
        }
      }
    }
  }

  // Then the other way, and the normalisation. What lies outside the picture is black, or with borders the mean.
  const { mean, std, crop_mode } = settings;
  const out = new Float32Array(channels * place.width * place.height);
  let target = 0;
  for (let c = 0; c < channels; c++) {
    const padding = crop_mode === "border" ? roundEven(255 * mean[c]) : 0;
    for (let y = 0; y < place.height; y++) {
      for (let x = 0; x < place.width; x++) {
        let value = padding;
        if (rows[y].weights.length && columns[x].weights.length) {
          const [{ from, weights }, i] = tall ? [columns[x], y] : [rows[y], x];
          let sum = 0;
          let source = (from - begin) * stride + i * channels + c;
          for (let k = 0; k < weights.length; k++, source += stride) sum += half[source] * weights[k];
          value = to8bits(sum);
        }
        out[target++] = (value / 255 - mean[c]) / std[c];
      }
    }
  }
  return { pixels: out, place };
}

// ---------------------------------------------------------------------------------------------------------------------
// The worker: loads ONNX Runtime and the model, and answers one picture after the other.

function work() {
  let settings, ort, session;

  // The browser compares every byte of the runtime with its hash before any of it runs. `import()` takes no hash, so
  // what was fetched and compared is imported from memory.
  async function verified({ file, integrity }) {
    const address = new URL(file, settings.runtime.base);
    const response = await fetch(address, { integrity }).catch(() => ({ ok: false }));
    if (!response.ok) throw new Error(`${address.href} is out of reach, or not the file that this page was made with.`);
    return response.arrayBuffer();
  }

  async function loadRuntime(engine) {
    const { module, binary } = settings.runtime[engine];
    postMessage({ type: "loading", what: "the engine" });
    const [script, wasm] = await Promise.all([verified(module), verified(binary)]);
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    ort = await import(address);
    URL.revokeObjectURL(address);
    ort.env.logLevel = "error";
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.numThreads = 1; // more need headers that static hosting doesn't send
  }

  async function loadModel() {
    const response = await fetch(new URL(settings.model.file, settings.base));
    if (!response.ok) throw new Error(`${settings.model.file}: ${response.status} ${response.statusText}.`);
    const content = new Uint8Array(settings.model.bytes);
    const reader = response.body.getReader();
    let count = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (count + part.value.length > content.length) throw new Error(`${settings.model.file} is another model's.`);
      content.set(part.value, count);
      count += part.value.length;
      postMessage({ type: "loading", what: "the model", share: count / content.length });
    }
    if (count < content.length) throw new Error(`${settings.model.file} ends too early.`);
    return content;
  }

  async function start(engine, model) {
    await loadRuntime(engine);
    session = await ort.InferenceSession.create(await model, { executionProviders: [engine], logSeverityLevel: 3 });
    const size = [1, ...settings.input_size];
    await infer(new Float32Array(size.reduce((a, b) => a * b)), size); // compiles; and what can't run fails here
  }

  async function infer(pixels) {
    const images = new ort.Tensor("float32", pixels, [1, ...settings.input_size]);
    return session.run({ images });
  }

  async function bestEngine() {
    if (settings.precision === "int8") return "wasm"; // WebGPU has no int8 convolutions
    const adapter = await navigator.gpu?.requestAdapter();
    return adapter && !adapter.info?.isFallbackAdapter ? "webgpu" : "wasm"; // no graphics card that is only emulated
  }

  async function load() {
    const model = loadModel();
    model.catch(() => {}); // it is awaited below, after the runtime
    let engine = settings.engine ?? (await bestEngine());
    try {
      await start(engine, model);
    } catch (error) {
      if (engine === "wasm") throw error;
      engine = "wasm"; // a graphics card or a driver that can't
      await start(engine, model);
    }
    postMessage({ type: "ready", engine });
  }

  async function answer({ id, file }) {
    const begin = performance.now();
    let bitmap;
    try {
      // Colour profiles stay unused and transparency unmultiplied, as in Pillow; the camera's rotation is applied.
      bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    } catch {
      return postMessage({ type: "unreadable", id });
    }
    const { pixels, place } = preprocess(bitmap, settings);
    bitmap.close();
    const middle = performance.now();
    const { logits, maps } = await infer(pixels);
    const end = performance.now();
    return postMessage({
      type: "answer",
      id,
      place,
      logits: logits.data,
      maps: maps && { data: maps.data, height: maps.dims[2], width: maps.dims[3] },
      milliseconds: { prepare: middle - begin, infer: end - middle },
    });
  }

  let turn = Promise.resolve(); // one after the other
  self.onmessage = ({ data }) => {
    const step = () => (data.type === "load" ? ((settings = data.settings), load()) : answer(data));
    turn = turn.then(step).catch((error) => postMessage({ type: "failed", id: data.id, message: String(error.message ?? error) }));
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The page.

const MOST_PIXELS = 89_478_485; // as Pillow reads without a warning
const SHOWN = 5;

function show() {
  const $ = (selector, root = document) => root.querySelector(selector);
  const settings = JSON.parse($("#settings").textContent);
  const state = $("#state");
  const results = $("#results");
  const cards = new Map(); // by id, those that wait for their answer
  let worker, dead, idle, count = 0;

  const say = (text, share) => {
    $("span", state).textContent = text;
    const progress = $("progress", state);
    progress.hidden = share === undefined;
    if (share === null) progress.removeAttribute("value");
    else if (share !== undefined) progress.value = share;
  };

  function problem(text) {
    const line = $("#problem").content.cloneNode(true).firstElementChild;
    $("span", line).textContent = text;
    $("button", line).onclick = () => line.remove();
    results.prepend(line);
  }

  // What there is to do; once the engine runs, what it runs on.
  function progress() {
    if (idle) say(cards.size ? `${cards.size} to go …` : idle);
  }

  const percent = (p) => (p >= 0.9995 ? "100" : p < 0.001 ? "<0.1" : (100 * p).toFixed(1)) + " %";
  const milliseconds = (ms) => (ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")) + " ms";

  // Adding pictures

  // The size, which tells a browser's image before its pixels are decoded; an error if it is none.
  async function measure(address) {
    const image = new Image();
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = reject;
      image.src = address;
    });
    return { width: image.naturalWidth, height: image.naturalHeight };
  }

  async function add(file) {
    const name = file.name || "picture";
    const address = URL.createObjectURL(file);
    let size;
    try {
      size = await measure(address);
      if (!size.width || !size.height) throw new Error("no size of its own");
    } catch {
      URL.revokeObjectURL(address);
      return problem(`${name} is no image that this browser can read.`);
    }
    if (size.width * size.height > MOST_PIXELS) {
      URL.revokeObjectURL(address);
      const millions = (n) => Math.round(n / 1e6).toLocaleString("en");
      return problem(`${name} is too large: ${millions(size.width * size.height)} million pixels, and this page reads up to ${millions(MOST_PIXELS)}.`);
    }
    const card = $("#answer").content.cloneNode(true).firstElementChild;
    const image = $("img", card);
    image.src = address;
    image.alt = name;
    image.width = size.width;
    image.height = size.height;
    card.classList.toggle("tiny", Math.max(size.width, size.height) <= 96);
    card.style.setProperty("--ratio", size.width / size.height);
    $("figcaption", card).textContent = name;
    const id = count++;
    $(".remove", card).onclick = () => {
      cards.delete(id);
      URL.revokeObjectURL(address);
      card.remove();
      progress();
    };
    $(".remove", card).ariaLabel = `Remove ${name}`;
    cards.set(id, { card, name, size, address });
    results.prepend(card);
    if (dead) return fail(id, dead);
    load();
    progress();
    return worker.postMessage({ type: "image", id, file });
  }

  async function addAll(files) {
    for (const file of files) await add(file);
    results.firstElementChild?.scrollIntoView({ block: "nearest" });
  }

  // Answers

  function answer({ id, logits, maps, place, milliseconds: ms }) {
    if (!cards.has(id)) return; // removed meanwhile
    const { card, name, size } = cards.get(id);
    cards.delete(id);
    const top = logits.reduce((a, b) => Math.max(a, b));
    const powers = Array.from(logits, (logit) => Math.exp(logit - top));
    const sum = powers.reduce((a, b) => a + b);
    const ranked = powers.map((power, index) => ({ index, p: power / sum })).sort((a, b) => b.p - a.p).slice(0, SHOWN);
    const label = ({ index }) => settings.labels[index];

    $("h3", card).textContent = label(ranked[0]);
    $("img", card).alt = `${name}: ${label(ranked[0])}, ${percent(ranked[0].p)}`;
    $("figcaption", card).textContent = `${name} · ${size.width} × ${size.height} · ${milliseconds(ms.infer)}`;
    $("figcaption", card).title = `Prepared in ${milliseconds(ms.prepare)}, classified in ${milliseconds(ms.infer)}`;

    const heat = maps && heatMap(card, maps, place, ranked.map(({ index }) => index));
    ranked.forEach((one, rank) => {
      const row = document.createElement("button");
      row.type = "button";
      row.disabled = !maps;
      if (maps) row.ariaPressed = "false";
      for (const [kind, text] of [["name", label(one)], ["bar", ""], ["p", percent(one.p)]]) {
        const part = document.createElement("span");
        part.className = kind;
        part.textContent = text;
        row.append(part);
      }
      row.style.setProperty("--p", one.p);
      row.onclick = () => choose(row, one);
      const item = document.createElement("li");
      item.append(row);
      $("ol", card).append(item);
      if (rank === 0 && maps) choose(row, one);
    });

    function choose(row, one) {
      for (const other of card.querySelectorAll("ol button")) other.ariaPressed = String(other === row);
      heat(ranked.indexOf(one), label(one));
    }

    $("#heard").textContent = `${name}: ${label(ranked[0])}, ${percent(ranked[0].p)}`;
    progress();
    card.classList.add("done");
    document.dispatchEvent(new CustomEvent("classified", { detail: { name, logits, maps, place, milliseconds: ms } }));
  }

  // The classifier's word at each position, less its mean over the classes, as probabilities don't see that: what is
  // left speaks for the class. The classes of a picture share one scale; those that aren't shown are forgotten.
  function heatMap(card, { data, height, width }, place, shown) {
    const area = height * width;
    const mean = new Float32Array(area);
    const classes = data.length / area;
    if (classes > 1) for (let i = 0; i < data.length; i++) mean[i % area] += data[i] / classes;
    const evidence = shown.map((index) => mean.map((value, at) => data[index * area + at] - value));
    const most = evidence[0].reduce((a, b) => Math.max(a, b), 1e-6);

    const canvas = $(".heat", card);
    canvas.width = width;
    canvas.height = height;
    // Only what the crop holds was looked at.
    const share = (part, whole) => `${(100 * part) / whole}%`;
    canvas.style.left = share(place.left, place.size[0]);
    canvas.style.top = share(place.top, place.size[1]);
    canvas.style.width = share(place.width, place.size[0]);
    canvas.style.height = share(place.height, place.size[1]);
    canvas.hidden = false;

    const toggle = $(".toggle", card);
    toggle.hidden = false;
    toggle.onclick = $(".stage", card).onclick = () => {
      canvas.hidden = !canvas.hidden;
      toggle.ariaPressed = String(!canvas.hidden);
    };
    return (rank, label) => {
      const context = canvas.getContext("2d");
      const image = context.createImageData(width, height);
      for (let at = 0; at < area; at++) image.data.set(glow(evidence[rank][at] / most), 4 * at);
      context.putImageData(image, 0, 0);
      canvas.hidden = false;
      toggle.ariaPressed = "true";
      $(".hint", card).textContent = `Bright: what speaks for ${label}`;
    };
  }

  // From a shade, so that the picture stays what it is, over red to a bright yellow.
  const STOPS = [[0, 0, 0, 105], [90, 14, 20, 105], [215, 60, 20, 125], [255, 150, 20, 150], [255, 240, 120, 170]];
  function glow(value) {
    const at = Math.max(0, Math.min(1, value)) * (STOPS.length - 1);
    const i = Math.min(Math.floor(at), STOPS.length - 2);
    return STOPS[i].map((from, k) => from + (STOPS[i + 1][k] - from) * (at - i));
  }

  function fail(id, text) {
    const { card, address } = cards.get(id);
    cards.delete(id);
    URL.revokeObjectURL(address);
    card.remove();
    problem(text);
    progress();
  }

  // The worker

  const ENGINES = { webgpu: "the graphics card (WebGPU)", wasm: "the processor (WebAssembly)" };

  function load() {
    if (worker) return;
    worker = new Worker("page.js", { type: "module" });
    worker.onmessage = ({ data }) => {
      const name = cards.get(data.id)?.name;
      if (data.type === "loading") say(`Loading ${data.what} …`, data.share ?? null);
      if (data.type === "ready") {
        document.documentElement.dataset.engine = data.engine;
        idle = `Runs on ${ENGINES[data.engine]}.`;
        progress();
      }
      if (data.type === "answer") answer(data);
      if (data.type === "unreadable" && name) fail(data.id, `${name} is damaged, or no image that this browser can read.`);
      if (data.type === "failed" && name) fail(data.id, `${name} could not be classified: ${data.message}`);
      if (data.type === "failed" && data.id === undefined) stop(`The model could not be loaded: ${data.message}`);
    };
    worker.onerror = (event) => stop(`The model could not be loaded: ${event.message ?? "this browser is too old."}`);
    const asked = new URLSearchParams(location.search).get("engine"); // ?engine=wasm leaves WebGPU out
    const engine = asked in ENGINES ? asked : undefined;
    const base = document.baseURI;
    const runtime = { ...settings.runtime, base: new URL(settings.runtime.base, base).href };
    worker.postMessage({ type: "load", settings: { ...settings, runtime, base, engine } });
  }

  function stop(text) {
    dead = text;
    idle = undefined;
    say("");
    problem(text);
    for (const { card } of cards.values()) card.remove();
    cards.clear();
    worker.terminate();
  }

  // What a visitor does

  const files = $("#files");
  $("#choose").onclick = () => files.click();
  files.onchange = () => {
    addAll([...files.files]);
    files.value = ""; // so that the same file can be chosen again
  };
  let over = 0; // entering a child comes before leaving its parent
  addEventListener("dragenter", () => $("#drop").classList.toggle("over", ++over > 0));
  addEventListener("dragleave", () => $("#drop").classList.toggle("over", --over > 0));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over = 0;
    $("#drop").classList.remove("over");
    if (!event.dataTransfer.files.length) problem("That was no file: copy the picture and paste it here, or save it first.");
    addAll([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) problem("There is no picture in the clipboard.");
    addAll([...event.clipboardData.files]);
  });

  for (const { file, name } of settings.examples) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = file;
    image.alt = `Try ${name}`;
    button.append(image);
    button.type = "button";
    button.onclick = async () => {
      try {
        const response = await fetch(file);
        if (!response.ok) throw new Error();
        addAll([new File([await response.blob()], name)]);
      } catch {
        problem(`${name} could not be loaded.`);
      }
    };
    $("#examples").append(button);
    $("#examples").hidden = false;
  }

  const viewfinder = $("#viewfinder");
  const video = $("video", viewfinder);
  $("#camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("#camera").onclick = async () => {
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      return problem(error.name === "NotAllowedError" ? "The camera is not allowed for this page." : "There is no camera that this page can use.");
    }
    viewfinder.showModal();
    return video.play();
  };
  viewfinder.onclose = () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  };
  $("#close").onclick = () => viewfinder.close();
  $("#shoot").onclick = () => {
    if (!video.videoWidth) return; // no picture yet
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => addAll([new File([blob], "camera.png")]));
    viewfinder.close();
  };

  if (location.protocol === "file:") {
    worker = { terminate() {} };
    return stop("Opened from a file, a browser lets this page load nothing: run `python -m http.server` in its folder.");
  }
  if (navigator.connection?.saveData) return say("The model is loaded with the first picture.");
  return load();
}

if (typeof document === "undefined") work();
else show();
