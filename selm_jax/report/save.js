// Saves plots as SVG and PNG, in the light page's colours, with title and legend; and says which
// tables can be scrolled sideways.
(() => {
  const sheet = document.styleSheets[0];
  const light = [...sheet.cssRules].find((rule) => rule.selectorText === ":root").style;
  const colours = (text) => text.replace(/var\((--[a-z0-9]+)\)/g, (_, name) => light.getPropertyValue(name).trim());
  const space = "http:" + "//www.w3.org/2000/svg"; // a name, not an address
  const font = "system-ui, Helvetica, Arial, sans-serif";

  function part(name, attributes, text) {
    const made = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  }

  // The plot as a file of its own: [text, width, height] in points.
  function standalone(figure) {
    const plot = figure.querySelector("svg.plot").cloneNode(true);
    const [, , width, height] = plot.getAttribute("viewBox").split(" ").map(Number);
    const items = [...(figure.querySelector(".legend") || figure.closest("section").querySelector(".head .legend") || { children: [] }).children];
    const lines = Math.ceil(items.length / 3);
    const whole = height + 22 + 16 * lines;
    const out = part("svg", { xmlns: space, viewBox: `0 0 ${width} ${whole}`, width: `${width}pt`, height: `${whole}pt`, "font-family": font });
    out.append(part("rect", { width, height: whole, fill: "#ffffff" }));
    out.append(part("text", { x: 4, y: 14, "font-size": 11, "font-weight": 600, fill: "#1d2127" }, figure.querySelector("h3").textContent));
    const body = part("g", { transform: "translate(0 22)" });
    body.append(...plot.childNodes);
    out.append(body);
    items.forEach((item, i) => {
      const [x, y] = [6 + (i % 3) * (width / 3), height + 32 + 16 * Math.floor(i / 3)];
      const sample = item.querySelector("svg").cloneNode(true);
      const [, , w, h] = sample.getAttribute("viewBox").split(" ").map(Number);
      const drawn = part("g", { transform: `translate(${x} ${y - 9})` });
      drawn.append(...sample.childNodes);
      out.append(drawn, part("text", { x: x + w + 5, y, "font-size": 9.5, fill: "#1d2127" }, item.textContent.trim()));
    });
    return [colours(new XMLSerializer().serializeToString(out)), width, whole];
  }

  function save(blob, name) {
    const link = document.createElement("a");
    link.download = name;
    link.href = URL.createObjectURL(blob);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const svg = (figure, name) => save(new Blob([standalone(figure)[0]], { type: "image/svg+xml" }), `${name}.svg`);

  function png(figure, name) {
    const [text, width, height] = standalone(figure);
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      const scale = 300 / 72; // dots of 300 to the inch
      [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, `${name}.png`), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  }

  for (const figure of document.querySelectorAll("figure")) {
    const files = figure.querySelector(".files");
    if (!files) continue;
    const name = files.querySelector("a").download.replace(/\.[a-z]+$/, "");
    for (const [label, work] of [["PNG", png], ["SVG", svg]]) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "save";
      button.textContent = label;
      button.setAttribute("aria-label", `Save ${name} as ${label}`);
      button.addEventListener("click", () => work(figure, name));
      files.prepend(button, " ");
    }
  }

  const signs = () => document.querySelectorAll(".wide").forEach((each) => {
    const scroll = each.querySelector(".scroll");
    each.querySelector(".sign").hidden = scroll.scrollWidth <= scroll.clientWidth + 1;
  });
  signs();
  addEventListener("resize", signs);
  document.querySelectorAll("details").forEach((each) => each.addEventListener("toggle", signs));
})();
