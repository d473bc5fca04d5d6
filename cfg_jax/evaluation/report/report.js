'use strict';
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, text = '', attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const table = document.getElementById('results');
  const heads = all('thead th', table);
  const lines = all('tbody tr', table);
  const byRow = new Map(lines.map((line) => [line.dataset.row, line]));
  document.body.classList.add('live');

  // ---------------------------------------------------------------- points and rows

  const tip = document.getElementById('tip');
  for (const point of all('.point')) {
    const title = point.querySelector('title'); // the browser's own tip, for pages without a script
    point.setAttribute('aria-label', title.textContent);
    title.remove();
  }

  /** Marks a row in the table and in all charts; lists its numbers at a point. */
  function show(element) {
    for (const active of all('.active')) active.classList.remove('active');
    tip.hidden = !element?.matches('.point');
    if (!element) return;
    const row = element.dataset.row;
    for (const same of all(`[data-row="${row}"]`)) same.classList.add('active');
    if (tip.hidden) return;
    const list = make('dl');
    [...byRow.get(row).cells].forEach((cell, index) => {
      if (cell.dataset.value === '' || heads[index].dataset.name === '') return;
      const text = cell.cloneNode(true);
      for (const hidden of all('.unseen, .swatch', text)) hidden.remove();
      list.append(make('dt', heads[index].dataset.name), make('dd', text.textContent));
    });
    tip.replaceChildren(make('b', byRow.get(row).dataset.name), list);
    const mark = element.getBoundingClientRect(); // the tip stands below it, or above where there is no room
    const top = mark.bottom + tip.offsetHeight + 8 < innerHeight ? mark.bottom + 4 : mark.top - tip.offsetHeight - 4;
    const left = Math.min((mark.left + mark.right - tip.offsetWidth) / 2, innerWidth - tip.offsetWidth - 12);
    tip.style.left = `${scrollX + Math.max(12, left)}px`;
    tip.style.top = `${scrollY + Math.max(12, top)}px`;
  }

  const find = (event) => event.target.closest?.('.point, tr[data-row]');
  for (const kind of ['pointerover', 'pointerdown', 'focusin']) addEventListener(kind, (event) => show(find(event)));
  addEventListener('keydown', (event) => {
    if (event.key === 'Escape') show(null);
    const chart = document.activeElement.closest('.point') && all('.point:not(.off)', document.activeElement.closest('.chart'));
    if (!chart) return;
    const index = chart.indexOf(document.activeElement);
    const goal = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1 };
    const next = chart[{ ...goal, Home: 0, End: chart.length - 1 }[event.key]];
    if (!next) return;
    event.preventDefault();
    chart[index].setAttribute('tabindex', '-1');
    next.setAttribute('tabindex', '0');
    next.focus();
  });

  // ---------------------------------------------------------------- the legend

  const parts = all('[data-curve]:not(li)');
  const legend = document.querySelector('.legend');
  const curves = legend ? all('li', legend) : [];
  const buttons = new Map();
  const isShown = (name) => buttons.get(name).getAttribute('aria-pressed') === 'true';

  /** Shows the curves of these names, and no others. */
  function showCurves(names) {
    for (const [name, button] of buttons) button.setAttribute('aria-pressed', names.has(name));
    for (const part of parts) part.classList.toggle('off', !names.has(part.dataset.curve));
    legend.parentElement.classList.toggle('one', names.size === 1);
    everything.disabled = names.size === buttons.size;
    for (const chart of all('.chart')) {
      const shown = all('.point:not(.off)', chart); // the Tab key reaches one of them
      if (shown.some((point) => point.getAttribute('tabindex') === '0')) continue;
      for (const point of all('.point', chart)) point.setAttribute('tabindex', point === shown[0] ? '0' : '-1');
    }
    show(null);
  }

  const everything = make('button', 'Show all', { type: 'button', class: 'all' });
  if (curves.length > 1) {
    for (const item of curves) {
      const name = item.dataset.curve;
      const button = make('button', '', { type: 'button', 'aria-pressed': 'true' });
      button.append(...item.childNodes);
      item.append(button);
      buttons.set(name, button);
      const alone = () => isShown(name) && [...buttons.keys()].filter(isShown).length === 1;
      const showAlone = () => showCurves(alone() ? new Set(buttons.keys()) : new Set([name]));
      button.addEventListener('click', (event) => {
        if (event.shiftKey) return showAlone();
        const names = new Set([...buttons.keys()].filter(isShown));
        if (!names.delete(name)) names.add(name);
        showCurves(names);
      });
      button.addEventListener('dblclick', (event) => event.shiftKey || showAlone()); // after two clicks, which undo each other
    }
    everything.addEventListener('click', () => showCurves(new Set(buttons.keys())));
    const last = make('li', '', { class: 'scripted' });
    last.append(everything);
    legend.append(last);
    showCurves(new Set(buttons.keys()));
  }

  // ---------------------------------------------------------------- the table

  heads.forEach((head, index) => {
    const button = make('button', '', { type: 'button' });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const value = (line) => line.cells[index].dataset.value;
      const isText = !head.classList.contains('number');
      const compare = (a, b) => (isText ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
      const known = lines.filter((line) => value(line) !== '').sort((a, b) => compare(value(a), value(b)));
      const missing = lines.filter((line) => value(line) === '');
      table.tBodies[0].append(...known, ...missing);
    });
  });

  const csv = document.getElementById('csv');
  const copy = document.getElementById('copy');
  copy.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(csv.value);
      copy.textContent = 'Copied';
      setTimeout(() => (copy.textContent = 'Copy as CSV'), 1500);
    } catch {
      csv.hidden = false; // a page that may not write to the clipboard shows the text to be copied by hand
      csv.select();
    }
  });

  // ---------------------------------------------------------------- pictures

  const pictures = all('.samples figure');
  if (!pictures.length) return;
  const dialog = make('dialog', '', { 'aria-label': 'Samples, enlarged' });
  const frame = make('div');
  const large = make('img');
  const bar = make('p');
  const caption = make('output');
  let current = 0;

  function turn(index) {
    current = (index + pictures.length) % pictures.length;
    const image = pictures[current].querySelector('img');
    large.src = image.src;
    large.alt = image.alt;
    caption.value = image.alt.replace(/^Samples at /, '');
    // Small pictures are enlarged by whole factors, so that all pixels have the same size.
    const [width, height] = ['width', 'height'].map((name) => Number(image.getAttribute(name)));
    const factor = Math.min(frame.clientWidth / width, frame.clientHeight / height);
    large.width = width * (factor > 1 ? Math.floor(factor) : factor);
    large.classList.toggle('shrunk', factor < 1);
  }

  const step = (label, text, by) => {
    const button = make('button', text, { type: 'button', 'aria-label': label });
    button.addEventListener('click', () => turn(current + by));
    return button;
  };
  const close = make('button', 'Close', { type: 'button' });
  close.addEventListener('click', () => dialog.close());
  frame.append(large);
  bar.append(step('Previous', '←', -1), caption, step('Next', '→', 1), close);
  dialog.append(frame, bar);
  dialog.addEventListener('keydown', (event) => {
    if (event.key === 'ArrowRight') turn(current + 1);
    if (event.key === 'ArrowLeft') turn(current - 1);
  });
  large.addEventListener('click', () => dialog.close());
  document.body.append(dialog);

  pictures.forEach((picture, index) => {
    const image = picture.querySelector('img');
    const button = make('button', '', { type: 'button', 'aria-label': `Enlarge: ${image.alt}` });
    image.replaceWith(button);
    button.append(image);
    button.addEventListener('click', () => {
      dialog.showModal();
      turn(index);
    });
  });
})();
