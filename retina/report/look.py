"""The style and the script of the pages, which show the operating point and all tables without the script too."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--ground:#fff;--panel:#f4f6f8;--edge:#c9d1d9;
--hit:#0a7d3c;--miss:#b35900;--false:#b3123c;--accent:#0b5cad;--c0:#0b5cad;--c1:#b35900;--c2:#0a7d3c;--c3:#8b2fc9}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--ground:#0f1419;--panel:#1a2129;--edge:#3a444e;
--hit:#4ade80;--miss:#fbbf24;--false:#fb7185;--accent:#6cb6ff;--c0:#6cb6ff;--c1:#fbbf24;--c2:#4ade80;--c3:#d8a6ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1500px;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--ground)}
h1{font-size:1.6rem;margin:.3rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--edge)}
p{max-width:75ch;margin:.4rem 0}.lead{font-size:1.15rem}.soft,caption,figcaption{color:var(--soft)}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;margin:.3rem 0}
caption{text-align:left;padding:.2rem 0}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--edge);text-align:right;white-space:nowrap}
th[scope=row],thead th:first-child{text-align:left}
#classes th[scope=row],.heat th{max-width:22ch;overflow:hidden;text-overflow:ellipsis}
thead th{vertical-align:bottom}
th button{font:inherit;font-weight:bold;color:inherit;background:none;border:0;padding:0;cursor:pointer;
text-decoration:underline dotted}
.panel{background:var(--panel);border:1px solid var(--edge);border-radius:6px;padding:.8rem;margin:.6rem 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:1rem}
figure{margin:0;background:var(--panel);border:1px solid var(--edge);border-radius:6px;padding:.6rem;min-width:0}
figure svg{width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--edge);stroke-width:.6}.line{fill:none;stroke-width:2;stroke:var(--c0)}
.c1{stroke:var(--c1);stroke-dasharray:7 3}.c2{stroke:var(--c2);stroke-dasharray:2 3}
.c3{stroke:var(--c3);stroke-dasharray:9 3 2 3}
.legend{font-size:.85rem;margin:.2rem 0}.legend span{margin-right:1rem;white-space:nowrap}
.legend svg{width:24px;height:12px;vertical-align:middle;margin-right:.3rem}
.heat td{min-width:2.6rem}.heat .right{outline:2px solid var(--hit);outline-offset:-3px}
.s1,.s2{background:color-mix(in srgb,var(--accent) 12%,transparent)}
.s3,.s4{background:color-mix(in srgb,var(--accent) 24%,transparent)}
.s5,.s6{background:color-mix(in srgb,var(--accent) 38%,transparent)}
.s7,.s8{background:color-mix(in srgb,var(--accent) 52%,transparent)}
.controls{display:flex;flex-wrap:wrap;gap:.6rem 1.2rem;align-items:center}
.controls label{display:flex;gap:.5rem;align-items:center;flex-wrap:wrap}
input[type=range]{width:min(420px,70vw)}
button,select{font:inherit;color:inherit;background:var(--ground);border:1px solid var(--edge);border-radius:4px;
padding:.2rem .6rem}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:1rem;align-items:start}
.shot{position:relative;display:block}.shot img{display:block;width:100%;height:auto}
.shot svg{position:absolute;inset:0;width:100%;height:100%}
.box{fill:none;stroke-width:3;vector-effect:non-scaling-stroke}
.hit .box{stroke:var(--hit)}.miss .box{stroke:var(--miss);stroke-dasharray:8 5}
.false .box{stroke:var(--false);stroke-dasharray:2 4}
.shot .hit .box{stroke:#2ee06f}.shot .miss .box{stroke:#ffb020}.shot .false .box{stroke:#ff5c8a}
.box.sign{stroke-dasharray:none!important;stroke-width:3}
.under{stroke:#000;stroke-width:5;fill:none;opacity:.55;vector-effect:non-scaling-stroke}
.key span{display:inline-block;margin-right:1rem}.key svg{width:34px;height:16px;vertical-align:middle}
figure figcaption{overflow-wrap:anywhere;font-size:.9rem}
pre{overflow:auto;background:var(--panel);padding:.6rem;font-size:.8rem;max-height:30rem}
details{margin:.4rem 0}summary{cursor:pointer}
[hidden]{display:none!important}
.live{display:none}.scripted .live{display:flex}
@media print{.live,.scripted .live,th button{text-decoration:none}.live,.scripted .live{display:none}
body{max-width:none;color:#000;background:#fff}figure,tr{break-inside:avoid}.wide{overflow:visible}}
@media (max-width:500px){body{padding:.6rem;font-size:15px}th,td{padding:.2rem .35rem}}
"""

SCRIPT = """
'use strict';
(()=>{
document.body.classList.add('scripted');
const by=id=>document.getElementById(id),source=by('data');
const data=source?JSON.parse(source.textContent):{thresholds:[]};
const slider=by('threshold'),which=by('which'),back=by('back'),out=by('shown');
const show=(v,d)=>v===null||!isFinite(v)?'\\u2013':v.toFixed(d);
const percent=v=>v===null||!isFinite(v)?'\\u2013':(100*v).toFixed(1)+' %';
const limits=data.thresholds.slice();
const sum=(list)=>list.reduce((a,b)=>a+b,0);
const counts=k=>limits[k]===data.thresholds[k]?[data.hits0[k],data.false0[k]]:
 [data.hits[k][Math.round(limits[k]*100)],data.false[k][Math.round(limits[k]*100)]];
const rates=(h,f,n)=>({p:h+f?h/(h+f):null,r:n?h/n:null,f:n?2*h/(h+f+n):null});
const cell=(row,name,value,order)=>{const td=row.querySelector('[data-col='+name+']');
 if(td){td.textContent=value;td.dataset.order=order===null||!isFinite(order)?-1:order;}};
const update=()=>{
 const all=data.objects.map((n,k)=>counts(k));
 const rows=[...document.querySelectorAll('#classes tbody tr')];
 for(const row of rows){const k=+row.dataset.label,[h,f]=all[k],n=data.objects[k],v=rates(h,f,n);
  cell(row,'threshold',limits[k].toFixed(3),limits[k]);cell(row,'hits',h,h);cell(row,'false',f,f);
  cell(row,'missed',n-h,n-h);cell(row,'precision',percent(v.p),v.p);cell(row,'recall',percent(v.r),v.r);
  cell(row,'f1',show(v.f,3),v.f);}
 const h=sum(all.map(x=>x[0])),f=sum(all.map(x=>x[1])),n=sum(data.objects),v=rates(h,f,n);
 by('precision').textContent=percent(v.p);by('recall').textContent=percent(v.r);by('f1').textContent=show(v.f,3);
 by('alarms').textContent=show(f/data.images,2);
 const same=new Set(limits).size===1?Math.round(limits[0]*100):null;
 const atPoint=limits.every((x,k)=>x===data.thresholds[k]);
 const matrix=by('confusion');
 if(matrix){const values=atPoint?data.matrix0:same!==null&&data.matrices?data.matrices[same]:null;
  by('stale').hidden=values!==null;
  if(values)[...matrix.tBodies[0].rows].forEach((row,i)=>{const line=values[i],total=sum(line)||1;
   [...row.querySelectorAll('td')].forEach((td,j)=>{if(i===line.length-1&&j===i)return;td.textContent=line[j];
    const level=i<line.length-1?Math.round(8*line[j]/total):0;
    td.className=(i===j&&i<line.length-1?'right':'wrong')+' s'+level;});});}
 gallery();
};
const kind=by('kind'),of=by('of');
const gallery=()=>{if(!kind)return;for(const shot of document.querySelectorAll('.gallery figure')){
 let h=0,m=0,f=0,some=false;
 for(const g of shot.querySelectorAll('g[data-label]')){
  const k=+g.dataset.label,score=g.dataset.score===undefined?null:+g.dataset.score,own=g.dataset.kind;let on;
  if(own==='hit'){on=score>=limits[k];h+=on;}
  else if(own==='false'){on=score>=limits[k];f+=on;}
  else{on=score===null||score<limits[k];m+=on;}
  const fits=(!of.value||+of.value===k)&&(!kind.value||kind.value===own||kind.value===g.dataset.error);
  g.toggleAttribute('hidden',!on||!fits);
  some=some||on&&fits;}
 shot.hidden=!some&&(of.value!==''||kind.value!=='');
 const tally=shot.querySelector('.tally');
 if(tally)tally.textContent=h+' found, '+m+' missed, '+f+' false';}
 const none=[...document.querySelectorAll('.gallery figure')].every(x=>x.hidden);by('none').hidden=!none;};
if(slider){
 slider.addEventListener('input',()=>{const t=+slider.value/100;out.textContent=t.toFixed(2);
  if(which.value==='')limits.fill(t);else limits[+which.value]=t;update();});
 which.addEventListener('change',()=>{const t=which.value===''?slider.value/100:limits[+which.value];
  slider.value=Math.round(t*100);out.textContent=t.toFixed(2);});
 back.addEventListener('click',()=>{data.thresholds.forEach((t,k)=>{limits[k]=t;});
  out.textContent='operating point';update();});
 if(kind)for(const filter of [kind,of])filter.addEventListener('change',gallery);
}
for(const table of document.querySelectorAll('table.sorts')){
 [...table.tHead.rows[0].cells].forEach((th,column)=>{const button=document.createElement('button');
  button.type='button';button.textContent=th.textContent;th.textContent='';th.append(button);
  button.addEventListener('click',()=>{const down=th.getAttribute('aria-sort')!=='descending';
   for(const other of table.tHead.rows[0].cells)other.removeAttribute('aria-sort');
   th.setAttribute('aria-sort',down?'descending':'ascending');
   const value=row=>{const td=row.cells[column];return td.dataset.order===undefined?td.textContent:+td.dataset.order;};
   const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=value(a),y=value(b);
    return (x<y?-1:x>y?1:0)*(down?-1:1);});
   table.tBodies[0].append(...rows);});});
}
})();
"""
